"""Any layer of any net as a stage: what a tapped layer puts out is a map, whatever the net itself gives.

The taps of a net are its attribute `taps`, the paths of modules such as `layer1` or `features.4`. There are hooks for
the time of a call only: a net with taps can be copied, folded, compiled and saved as any other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model.errors import InputError
from model.registry import suggest

# What these put out is what they take, what one position makes of another, or of a size that is not the image's.
NO_STAGES = (nn.Identity, nn.Dropout, nn.Softmax, nn.AdaptiveAvgPool2d)
ROWS = (nn.Sequential, nn.ModuleList)  # and not what is made of these: that is a block, or a stage
MAPS = "a map is (N, C, S, S), (N, S, S, C), or (N, L, C) with a square number of tokens, behind class tokens or not"
NUM_BLOCKS = 4  # that are chosen of a net of tokens

ResultT = TypeVar("ResultT")


class TapError(InputError):
    """A tapped layer is not there, or it gives no map.

    Args:
        predicate: What is wrong with the net, as a sentence without its subject.
    """

    def __init__(self, predicate: str) -> None:
        super().__init__(f"the net {predicate}")
        self.predicate = predicate


def classifier_of(net: nn.Module) -> str:
    """Returns the path of the last linear or convolution layer: the classifier."""
    return [path for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def set_taps(net: nn.Module, paths: Sequence[str] | None) -> None:
    """Makes the outputs of modules the maps of a net; None: it gives them itself, or `choose` finds them."""
    vars(net)["taps"] = tuple(paths or ())


def taps_of(net: nn.Module) -> tuple[str, ...]:
    """Returns the paths of a net's tapped modules."""
    return getattr(net, "taps", ())


def listen(
    net: nn.Module, run: Callable[[Tensor], ResultT], images: Tensor
) -> tuple[ResultT, tuple[Tensor, ...], Tensor | None]:
    """Runs a net and listens to its taps.

    Args:
        net: With taps, or without.
        run: The net, or one of its methods.
        images: `(N, 3, H, W)`.

    Returns:
        What `run` returned, the map of each tap (see `map_of`), and the embedding (see `embedding_of`).

    Raises:
        TapError: A tapped module is not there, is not called just once, puts out no map, or a map that a later layer
            overwrites.
    """
    paths = taps_of(net)
    modules = [module_of(net, path) for path in paths]
    calls: list[list[tuple[Any, int]]] = [[] for _ in paths]
    read: list[Any] = []
    handles = [
        module.register_forward_hook(lambda _, inputs, output, heard=heard: heard.append((output, version_of(output))))
        for module, heard in zip(modules, calls, strict=True)
    ]
    known = vars(net)
    if "classifier_path" not in known:  # a walk through all modules, at each step a millisecond
        known["classifier_path"] = classifier_of(net)
    classifier = net.get_submodule(known["classifier_path"])
    handles.append(classifier.register_forward_pre_hook(lambda _, inputs: read.extend(inputs[:1])))
    try:
        result = run(images)
    finally:
        for handle in handles:
            handle.remove()
    maps = []
    for path, heard in zip(paths, calls, strict=True):
        if len(heard) != 1:
            times = f"calls module {path!r} {len(heard)} times" if heard else f"does not call module {path!r}"
            raise TapError(f"{times} for an image; name one that it calls once")
        output, version = heard[0]
        if version_of(output) != version:
            raise TapError(f"overwrites in place what module {path!r} puts out; name the layer that does so instead")
        found = map_of(output, len(images), num_prefixes(net))
        if found is None:
            raise TapError(f"has no maps at {path!r}: {shape_of(output)} of {len(images)} images; {MAPS}")
        maps.append(found)
    return result, tuple(maps), embedding_of(read)


def module_of(net: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path.

    Raises:
        TapError: There is none; with the nearest path.
    """
    try:
        module = net.get_submodule(path)
    except AttributeError:
        module = net
    if module is net:
        near = suggest(path, [known for known, _ in net.named_modules() if known])
        top = ", ".join(name for name, _ in net.named_children())
        raise TapError(f"has no module {path!r}; {near if near.startswith('did') else f'it has {top}'}")
    return module


def version_of(output: Any) -> int:
    """Returns how often a tensor was changed in place; 0 while torch compiles, and of what is no tensor."""
    return output._version if isinstance(output, Tensor) and not torch.compiler.is_compiling() else 0


def num_prefixes(net: nn.Module) -> int:
    """Returns how many tokens stand before those of the image, if the net says so, as those of timm do."""
    number = getattr(net, "num_prefix_tokens", 0)
    return number if isinstance(number, int) else 0


def map_of(output: Any, num_images: int, prefixes: int = 0) -> Tensor | None:
    """Returns what a module puts out as maps `(N, C, S, S)`; None if it is not that.

    Maps are square, as images are. So `(N, A, B, C)` with B = C is channels first, and else with A = B channels last;
    if all three are equal, it is taken for channels first. In `(N, L, C)` L tokens are a square; if L is none, the
    tokens behind the first, the first two, or the first `prefixes` are.

    Args:
        output: Of a module.
        num_images: N.
        prefixes: Tokens that may stand before those of the image.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[:1] != (num_images,):
        return None
    if output.ndim == 4:
        _, first, second, third = output.shape
        if second == third:
            return output
        return output.permute(0, 3, 1, 2) if first == second else None
    if output.ndim == 3:
        for skipped in (0, 1, 2, prefixes):
            side = math.isqrt(max(output.shape[1] - skipped, 0))
            if side > 0 and side * side == output.shape[1] - skipped:
                return output[:, skipped:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (N, L, C) -> (N, C, S, S)
    return None


def embedding_of(read: Sequence[Any]) -> Tensor | None:
    """Returns what the classifier read, `(N, D)`: maps are averaged, as those of a convolution that classifies.

    Args:
        read: The input of each of its calls; if it was not one call with vectors or maps, there is no embedding.
    """
    if len(read) != 1 or not isinstance(read[0], Tensor) or read[0].ndim not in (2, 4):
        return None
    return read[0] if read[0].ndim == 2 else read[0].mean((2, 3))


def shape_of(output: Any) -> str:
    """Returns what a module puts out, in words."""
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


@torch.no_grad()
def choose(net: nn.Module, image: Tensor) -> tuple[str, ...]:
    """Returns paths of modules that may be the stages of a net which gives none itself.

    For each size of maps, of decreasing sizes, it is the last of the outermost modules before the classifier that put
    them out: `layer1`, not `layer2.0.conv1`. Maps of 1x1 count only if there are no others, and sizes that are found
    deep within modules only do not count at all: there something pads, or attends. Of tokens whose number stays the
    same all the way, some of the blocks in a row are stages, evenly spaced.

    Args:
        net: In eval mode.
        image: `(1, 3, H, W)`.
    """
    images = torch.cat([image, image])  # what is made of weights alone has no row for each
    calls: list[tuple[str, Any, int]] = []
    ends: list[int] = []
    handles = [
        module.register_forward_hook(lambda _, inputs, out, path=path: calls.append((path, out, version_of(out))))
        for path, module in net.named_modules()
        if path and not isinstance(module, NO_STAGES)
    ]
    classifier = net.get_submodule(classifier_of(net))
    handles.append(classifier.register_forward_pre_hook(lambda _, inputs: ends.append(len(calls))))
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(path for path, _, _ in calls)
    sizes: dict[str, int] = {}
    tokens = []
    for path, output, version in calls[: ends[-1] if ends else None]:
        maps = map_of(output, len(images), num_prefixes(net))
        if maps is not None and times[path] == 1 and version_of(output) == version:
            sizes[path] = maps.shape[-1]
            tokens += [path] if output.ndim == 3 else []
    depths = {path: depth_of(net, path) for path in sizes}
    stages: dict[int, str] = {}
    for path, size in sizes.items():
        if size not in stages or depths[path] <= depths[stages[size]]:
            stages[size] = path
    if len(stages) > 1:
        stages.pop(1, None)
    deepest = min((depths[path] for path in stages.values()), default=0) + 1
    paths = [stages[size] for size in sorted(stages, reverse=True) if depths[stages[size]] <= deepest]
    if len(paths) == 1 and paths[0] in tokens:
        return blocks_of(net, [path for path in tokens if sizes[path] == sizes[paths[0]]]) or tuple(paths)
    return tuple(paths)


def depth_of(net: nn.Module, path: str) -> int:
    """Returns how many modules a module is inside of; those that only stand for a row of others do not count."""
    names = path.split(".")[:-1]
    parents = (net.get_submodule(".".join(names[: number + 1])) for number in range(len(names)))
    return sum(type(parent) not in ROWS for parent in parents)


def blocks_of(net: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Returns about four of the modules that stand in the outermost row of them, evenly spaced, with the last."""
    rows: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        parent = path.rpartition(".")[0]
        if type(net.get_submodule(parent)) in ROWS:
            rows[parent].append(path)
    row = min(rows.values(), key=lambda row: (row[0].count("."), -len(row)), default=[])
    count = min(NUM_BLOCKS, len(row))
    return tuple(row[(number + 1) * len(row) // count - 1] for number in range(count))

"""A frozen net made cheaper: batch norms become a part of the layers before them, and weights are cast once.

A batch norm with fixed statistics is one scale and one shift per channel, which the weights of the layer in front of it
can hold as well.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.devices import DTYPES
from model.outputs import Outputs, features_of

# The kinds of layers that take a batch norm in, and the kind of it.
NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: nn.BatchNorm2d, nn.Linear: nn.BatchNorm1d}


def fold_batch_norms(
    net: nn.Module, needs: frozenset[str] = frozenset({"logits"}), shape: Sequence[int] = (3, 32, 32)
) -> tuple[nn.Module, int]:
    """Returns a copy of a net for inference, in which the layers before batch norms do what the norms did.

    A norm is folded if it is all that reads a convolution or a linear layer. The copy is of the same class, with the
    same paths: a folded norm is an identity there, and its layer's output is what the norm's was.

    Args:
        net: Stays as it is.
        needs: Which of its outputs are asked for; with more than the logits, `features_of` is of use, too.
        shape: Of an image, `(C, H, W)`; which operations a net consists of may depend on it.

    Returns:
        The copy, in eval mode and without gradients, and how many norms were folded: none if the net is such that it
        cannot be told who reads what.
    """
    frozen = copy.deepcopy(net).eval().requires_grad_(False)
    questions = [nn.Module.__call__] if needs <= {"logits"} else [nn.Module.__call__, features_of]
    try:
        # Nothing is computed on the meta device; a net whose operations depend on values fails there. `to` would give
        # modules that share a weight one each.
        tensors = [*frozen.parameters(), *frozen.buffers()]
        dummy = copy.deepcopy(frozen, {id(tensor): tensor.to("meta") for tensor in tensors})
        image = torch.empty(1, *shape, device="meta", dtype=next(frozen.parameters()).dtype)
        pairs = set.intersection(*(foldable(dummy, ask, image) for ask in questions))
    except Exception:  # a net of others may raise anything; unfolded it is as good, just slower
        return frozen, 0
    modules = dict(frozen.named_modules())
    for layer, norm in pairs:
        fold(modules[layer], modules[norm])
        for path in [p for p, m in frozen.named_modules(remove_duplicate=False) if m is modules[norm]]:
            frozen.set_submodule(path, nn.Identity().eval())
    return frozen, len(pairs)


class Uses(TorchDispatchMode):
    """Counts, while it is active, the operations that take a tensor.

    Attributes:
        counts: Of each tensor, by its id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.kept: list[Tensor] = []  # no other tensor may get the id of one that is gone

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.take((args, kwargs))
        return func(*args, **(kwargs or {}))

    def take(self, values: Any) -> None:
        """Counts the tensors of a nested structure."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        self.counts.update(map(id, tensors))
        self.kept += tensors


def foldable(net: nn.Module, ask: Callable[[nn.Module, Tensor], Any], image: Tensor) -> set[tuple[str, str]]:
    """Returns the paths of the layers that only a batch norm reads, each with the norm's.

    Args:
        net: In eval mode.
        ask: What the net and the image are given to: `features_of`, or what only calls the net.
        image: `(1, C, H, W)`.
    """
    uses = Uses()
    calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    # What a hook does to a layer, or reads there, it would do to something else afterwards.
    modules: dict[str, Any] = {
        path: module
        for path, module in net.named_modules()
        if type(module) in {*NORMS, *NORMS.values()} and not (module._forward_hooks or module._forward_pre_hooks)
    }
    handles = [
        module.register_forward_hook(lambda _, inputs, output, path=path: calls[path].append((inputs[0], output)))
        for path, module in modules.items()
    ]
    with torch.no_grad(), uses:
        outputs = ask(net, image)
    uses.take(vars(outputs) if isinstance(outputs, Outputs) else outputs)  # the caller reads these
    for handle in handles:
        handle.remove()
    once = {path: calls[path][0] for path in modules if len(calls[path]) == 1}
    made_by = {id(output): path for path, (_, output) in once.items()}
    pairs = set()
    for norm_path, (taken, _) in once.items():
        path = made_by.get(id(taken))
        if path is None or NORMS.get(type(modules[path])) is not type(modules[norm_path]):
            continue
        layer, norm = modules[path], modules[norm_path]
        # Of a linear layer's output with more dimensions, the norm's channels are not the layer's.
        fits = norm.running_mean is not None and taken.ndim == (4 if isinstance(layer, nn.Conv2d) else 2)
        if fits and all(uses.counts[id(tensor)] == 1 for tensor in (taken, *layer.parameters(), *norm.parameters())):
            pairs.add((path, norm_path))
    return pairs


def fold(layer: Any, norm: Any) -> None:
    """Puts a batch norm's scale and shift into the weights of the layer before it."""

    def exact(value: Any) -> Any:
        # In float64, which not every device has: only the result is rounded.
        return None if value is None else value.cpu().double()

    fused = fuse_conv_bn_weights(
        exact(layer.weight),
        exact(layer.bias),
        exact(norm.running_mean),
        exact(norm.running_var),
        norm.eps,
        exact(norm.weight),
        exact(norm.bias),
    )
    layer.weight, layer.bias = (nn.Parameter(value.to(layer.weight), requires_grad=False) for value in fused)


def cast_weights(net: nn.Module, precision: str) -> nn.Module:
    """Casts the weights of convolutions and linear layers to what autocast computes these in.

    Autocast does the same in every step: it keeps only casts of weights that learn. The outputs are the same, bit by
    bit. A folded bias is rounded, too, as autocast does.

    Args:
        net: Changed in place; from now on it runs under autocast only.
        precision: fp32, bf16 or fp16.

    Returns:
        The net.
    """
    if precision != "fp32":
        for module in net.modules():
            if type(module) in NORMS:
                module.to(DTYPES[precision])
    return net

"""Stands in for train.py: does what params.json says under `stub.do`, and writes what train.py would."""

import argparse
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--model_dir", type=Path, nargs="+", required=True)
parser.add_argument("--check", action="store_true")
parser.add_argument("--quiet", action="store_true")
parser.add_argument("--device", default="auto")
parser.add_argument("--restart", action="store_true")
args = parser.parse_args()

if args.check:
    wrong = 0
    for model_dir in args.model_dir:
        loss = json.loads((model_dir / "params.json").read_text()).get("loss", {})
        if loss.get("alpha", 0) > 1:
            print(f"{model_dir / 'params.json'}: loss.alpha: {loss['alpha']} is above 1", file=sys.stderr)
            wrong = 2
        if loss.get("name") == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
    sys.exit(wrong)

[model_dir] = args.model_dir
params = json.loads((model_dir / "params.json").read_text())
stub, started = params.get("stub", {}), time.monotonic()


path = model_dir / "run.json"
before = json.loads(path.read_text()) if path.exists() else {}
attempts = [*before.get("attempts", []), {"pid": os.getpid(), "host": platform.node()}]


def write_run(status, reason=None, epoch=0, **more):
    progress = {"status": status, "reason": reason, "epoch": epoch, "num_epochs": params["num_epochs"]}
    text = json.dumps({**progress, "attempts": attempts, **more})
    path.with_suffix(".tmp").write_text(text)  # whole or not at all, as train.py does it
    path.with_suffix(".tmp").replace(path)


def on_sigterm(*_):
    if signals.append(time.monotonic()) or len(signals) > 1:  # train.py ends at once at the second one
        os._exit(99)
    time.sleep(0.4 if stub.get("do") == "sleep" else 0)
    write_run("interrupted", "signal", json.loads(path.read_text()).get("epoch") or 1)
    sys.exit(143)


lock = (model_dir / ".lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
signals: list[float] = []
signal.signal(signal.SIGTERM, signal.SIG_IGN if stub.get("do") == "stubborn" else on_sigterm)
write_run("running")
(model_dir / "pid").write_text(str(os.getpid()))
while "after" in stub and not (model_dir.parent / stub["after"] / "pid").exists():
    time.sleep(0.01)
match stub.get("do", "ok"):
    case "fail":
        print("some line\nthe teacher has 100 classes\x1b[31m but the student has 10\n\n", flush=True)
        write_run("failed", "teacher")
        sys.exit(2)
    case "segfault":
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (model_dir / "worker").write_text(str(worker.pid))
        os.kill(os.getpid(), signal.SIGSEGV)
    case "flood":
        while True:
            print("x" * 10_000)
    case "locked":  # at first
        if not (model_dir / "was_locked").exists():
            (model_dir / "was_locked").touch()
            (model_dir / "run.json").unlink()
            sys.exit(75)
    case "nothing":
        sys.exit(0)
    case "sleep" | "stubborn":
        time.sleep(60)
    case "fail_once":
        if len(attempts) == 1:
            write_run("failed", "storage", 1)
            sys.exit(1)
    case "diverge":
        write_run("failed", "diverged", 1)
        sys.exit(1)
    case "epochs":  # each with an accuracy that alpha decides, from the epoch on that an earlier attempt has reached
        for epoch in range(before.get("epoch", 0) + 1, params["num_epochs"] + 1):
            time.sleep(stub.get("seconds", 0))
            accuracy = params["loss"]["alpha"] * epoch / params["num_epochs"]
            with (model_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"epoch": epoch, "val": {"accuracy": accuracy}}) + "\n")
            write_run("running", epoch=epoch, best={"accuracy": accuracy, "epoch": epoch})
            while (model_dir.parent / "hold").exists():
                time.sleep(0.02)
        write_run("completed", epoch=epoch, best={"accuracy": accuracy, "epoch": epoch})
        sys.exit(0)
time.sleep(stub.get("seconds", 0))
record = {
    "started": started,
    "ended": time.monotonic(),
    "threads": os.environ["OMP_NUM_THREADS"],
    "argv": sys.argv[1:],
    "stdin": sys.stdin.read(),
    "session": os.getsid(0) == os.getpid(),
}
(model_dir / "record.json").write_text(json.dumps(record))
accuracy = params.get("loss", {}).get("alpha", 0.5)
write_run("completed", epoch=params["num_epochs"], best={"accuracy": accuracy, "epoch": 2})
print("done")

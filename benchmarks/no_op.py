"""Stands in for train.py where all but the training is timed: a run is completed at once.

Children are checked by train.py itself, as in any search.
"""

import json
import os
import sys
from pathlib import Path

if "--check" in sys.argv:
    train = Path(__file__).resolve().parent.parent / "train.py"
    os.execv(sys.executable, [sys.executable, str(train), *sys.argv[1:]])
path = Path(sys.argv[sys.argv.index("--model_dir") + 1], "run.json")
epochs = json.loads(path.with_name("params.json").read_text())["num_epochs"]
best = {"accuracy": 0.5, "epoch": epochs}
temporary = path.with_name(".run.json.tmp")
temporary.write_text(json.dumps({"status": "completed", "epoch": epochs, "num_epochs": epochs, "best": best}))
temporary.replace(path)

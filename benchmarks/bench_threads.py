"""What threads cost `rlekf train` on quiet cores, and beside a busy program.

    python benchmarks/bench_threads.py [--data DIR] [--repeat 3] [--beside CHECKOUT]

A row is the median time, in ms, of a batch of copper with the paper's network, of short trainings in turn, with the
number of threads that `rlekf train` chooses or is told by `--threads`. "busy" is beside one process that never rests.
`--beside` trains with another checkout, too, which has its library built in place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from bench_training import ROOT, available, folder
from rows import MACHINE, append, commit, machine

RESULTS = ROOT / "benchmarks/results/threads.csv"
COLUMNS = ["method", "batches", "neighbour", "asked", "ms", "processors", *MACHINE]
BATCHES = {"RLEKF": 25, "Adam": 100}
ASKED = "", "2"


def milliseconds(method: str, checkout: Path, data: Path, asked: str) -> float:
    """Of a batch, in a training of its own."""
    optimizer = {"type": "RLEKF", "block_size": 1024} if method == "RLEKF" else {"type": "Adam"}
    given = {
        "model": {
            "type_map": ["Cu"],
            "descriptor": {"type": "se_e2_a", "sel": "auto", "rcut": 6.0, "seed": 1},
            "fitting_net": {"seed": 1},
        },
        "optimizer": optimizer,
        "training": {
            "training_data": {"systems": str(folder(data.resolve(), "Cu/pwmlff_aimd_72"))},
            "numb_steps": BATCHES[method],
            "seed": 1,
        },
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    environment["PYTHONPATH"] = str(checkout)
    options = ["--threads", asked] if asked and checkout == ROOT else []
    if asked and not options:
        environment["OMP_NUM_THREADS"] = asked
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "input.json").write_text(json.dumps(given))
        command = [sys.executable, "-m", "rlekf_ext", "train", "input.json", *options]
        subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True)
        summary = json.loads((Path(work) / "lcurve.out.json").read_text())
    return 1e3 * summary["seconds"] / summary["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not available("Cu", given.data):
        parser.error(f"{given.data} should have the data of Cu but does not; name their folder by --data.")
    where = machine(given.output)
    checkouts = [ROOT, *([given.beside.resolve()] if given.beside else [])]
    for neighbour in ("none", "busy"):
        times = defaultdict(list)
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if neighbour == "busy" else None
        try:
            for _ in range(given.repeat):
                for case in itertools.product(BATCHES, ASKED, checkouts):
                    method, asked, checkout = case
                    times[case].append(milliseconds(method, checkout, given.data, asked))
        finally:
            if other:
                other.kill()
        for (method, asked, checkout), found in times.items():
            row = {"method": method, "batches": BATCHES[method], "neighbour": neighbour, "asked": asked or "chosen"}
            row |= {"ms": f"{median(found):.2f}", "processors": os.cpu_count()}
            append(given.output, COLUMNS, [{**row, **where, "threads": "", "commit": commit(checkout)}])
            print(*(row[name] for name in COLUMNS[:6]), commit(checkout), sep="   ", flush=True)


if __name__ == "__main__":
    main()

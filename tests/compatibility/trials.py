"""Try a set-up with a method, in the parent of the ranks."""

import json
import tempfile
from pathlib import Path

from testing.runner import run_ranks
from tests.compatibility.cells import CALLERS, DTYPES, train_stock, try_callers, try_resize
from tests.compatibility.methods import METHODS
from tests.compatibility.setups import SETUPS


def outcome(folder: Path, setup_name: str, method_name: str) -> dict[str, str]:
    """Return what came of each caller: "passed", "refused: CODE", or a traceback."""
    setup, method = SETUPS[setup_name], METHODS[method_name]
    reference = method.reference_folder(folder, DTYPES[setup.dtype])
    with tempfile.TemporaryDirectory(prefix="compatibility-") as name:
        out, nvme = Path(name), Path(name) / "nvme"
        nvme.mkdir()
        given = {"setup": setup, "method": method, "nvme": nvme, "out": out}
        run_ranks(setup.ranks, train_stock, {"folder": reference, **given})
        run_ranks(setup.ranks, try_callers, {"folder": folder, "reference": reference, **given})
        results = json.loads((out / "results.json").read_text())
        if results["resize"] == "passed":
            run_ranks(setup.ranks, try_resize, {"folder": folder, "reference": reference, **given})
            results |= json.loads((out / "resize.json").read_text())
    assert results.keys() == CALLERS.keys()
    return results

import pytest

from tests import small_job


@pytest.fixture
def job(tmp_path):
    """The command line of a small run that does not end by itself, without the launcher."""
    folder = small_job.make(tmp_path, samples=16)
    arguments = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / "out",
        "max_steps": 100_000, "per_device_train_batch_size": 1, "save_strategy": "no", "logging_steps": 1, "packing": False,
    }  # fmt: skip

    def words(**changes: object) -> list[str]:
        return [word for name, value in (arguments | changes).items() for word in (f"--{name}", str(value))]

    return words

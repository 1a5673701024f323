"""An installed package has every module: `setup.cfg` lists all folders."""

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_is_listed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "zero_sft").rglob("__init__.py")}
    assert listed == folders | {"zero_sft.ds_configs", "zero_sft.examples"}

"""The lower bounds of settings.ini as exact versions, for `make lowest`."""

from configparser import ConfigParser
from pathlib import Path

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
for name in ("requirements", "study_requirements", "gguf_requirements", "dev_requirements"):
    for one in cfg[name].split():
        print(one.replace(">=", "=="))

"""The lower bounds of settings.ini as exact versions, for `make lowest`: an installation at the oldest versions that we promise."""

from configparser import ConfigParser
from pathlib import Path

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
print(
    "\n".join(
        one.replace(">=", "==")
        for one in (cfg["requirements"] + " " + cfg["dev_requirements"]).split()
    )
)

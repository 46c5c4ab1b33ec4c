"""Packaging: every fact comes from settings.ini, so that it is written once."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
study, vision = cfg["study_requirements"].split(), cfg["vision_requirements"].split()
gguf, eyes = cfg["gguf_requirements"].split(), cfg["eyes_requirements"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8")
    if Path("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=cfg["keywords"],
    author=cfg["author"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["mllm_compress", "mllm_compress.*"]),
    package_data={
        "mllm_compress": [
            "profiles/*.yaml",
            "benchmarks.yaml",
            "published/*.csv",
            "advice.csv.xz",
            "study.mplstyle",
            "cli/rows.json",
            "models/*.*",
            "models/*/*",
            "py.typed",
        ]
    },
    install_requires=cfg["requirements"].split(),
    extras_require={
        "study": study,
        "dev": study + gguf + cfg["dev_requirements"].split(),
        "vision": vision,
        "internvl": vision,  # its former name
        "gguf": gguf,
        "eyes": eyes,
        "play": study + cfg["play_requirements"].split(),
        "quantize": cfg["quantize_requirements"].split(),
        "trl": cfg["trl_requirements"].split(),
        "lmms-eval": cfg["lmms_eval_requirements"].split(),
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "lmms_eval.models": ["mllm_compress=mllm_compress.evaluation.lmms_eval:manifest"],
    },
    zip_safe=False,
)

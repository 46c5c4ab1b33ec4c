"""llama.cpp for tests and benchmarks, through node-llama-cpp, whose packages hold built binaries.

    npm install --prefix FOLDER --omit=optional \\
        node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1

and MLLM_COMPRESS_LLAMA_CPP=FOLDER, or FOLDER = ~/.cache/mllm_compress/llama.cpp, where `.ci/run`
installs it. Without it, the tests that need it are skipped.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

DEFAULT = Path("~/.cache/mllm_compress/llama.cpp")
DRIVER = Path(__file__).parent.parent / "bench/llama_cpp.mjs"


def engine_folder() -> Path | None:
    "The folder with node-llama-cpp, None where there is none, or no node."
    folder = Path(os.environ.get("MLLM_COMPRESS_LLAMA_CPP") or DEFAULT).expanduser()
    found = (folder / "node_modules/node-llama-cpp").is_dir() and shutil.which("node")
    return folder.resolve() if found else None


def run_engine(requests: list, folder: Path | None = None, timeout: float = 120) -> list:
    "What llama.cpp answers to requests (see bench/llama_cpp.mjs), each for a GGUF file."
    run = subprocess.run(
        ["node", str(DRIVER), str(folder or engine_folder())],
        input=json.dumps([r | {"model": str(Path(r["model"]).resolve())} for r in requests]),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if run.returncode or not run.stdout:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout)

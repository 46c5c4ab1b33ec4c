"""llama.cpp for tests and benchmarks, through node-llama-cpp, whose packages hold built binaries.

    npm install --prefix FOLDER --omit=optional \\
        node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1

and MLLM_COMPRESS_LLAMA_CPP=FOLDER, or FOLDER = ~/.cache/mllm_compress/llama.cpp, where `.ci/run`
installs it. Pictures need llama.cpp's server, which the Python package xllamacpp holds:

    pip install --no-deps --target FOLDER/python xllamacpp==2026.10.11549

Without them, the tests that need them are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
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


def picture_engine() -> Path | None:
    "The folder with xllamacpp, None where there is none."
    folder = Path(os.environ.get("MLLM_COMPRESS_LLAMA_CPP") or DEFAULT).expanduser() / "python"
    return folder.resolve() if (folder / "xllamacpp").is_dir() else None


PICTURES = """
import base64, json, sys, urllib.request
sys.path.insert(0, sys.argv[1])
import xllamacpp

request = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path = request["model"], request["mmproj"]
params.mmproj_use_gpu, params.warmup = False, False
params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
image, found = base64.b64encode(open(request["image"], "rb").read()).decode(), []


def ask(path, body=None):
    data = body and json.dumps(body).encode()
    header = {"Content-Type": "application/json"}
    call = urllib.request.Request(server.listening_address + path, data, header)
    return json.load(urllib.request.urlopen(call))


marker = ask("/props")["media_marker"]
for text in request["prompts"]:
    prompt = {"prompt_string": text.replace("<image>", marker), "multimodal_data": [image]}
    options = {"n_predict": 1, "n_probs": request["vocabulary"], "temperature": 0}
    answer = ask("/completion", {"prompt": prompt, **options})
    tops = answer["completion_probabilities"][0]["top_logprobs"]
    found.append({"tokens": answer["tokens_evaluated"], **{t["id"]: t["logprob"] for t in tops}})
print(json.dumps(found))
"""


def run_pictures(**request) -> list:  # per prompt {token id: log-probability, "tokens": number}
    "The next-token distributions of llama.cpp after prompts about one picture."
    run = subprocess.run(
        [sys.executable, "-c", PICTURES, str(picture_engine())],
        input=json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in request.items()}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(next(s for s in run.stdout.splitlines() if s.startswith("[{")))

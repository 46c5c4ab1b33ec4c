"""Processes forked from one that has imported everything: what they have, and how they end."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from test_kill import NOTEBOOK, Run, alive, checkout, linux, soon  # noqa: F401
from typer.testing import CliRunner

from mllm_compress.cli import studying
from mllm_compress.cli.app import app
from mllm_compress.study import drawing, forked_kernels, runner
from mllm_compress.utils import processes

ABOUT = """
import gc
import json
import os
import sys

about = {
    "imported": "seaborn" in sys.modules,
    "threads": os.environ["OMP_NUM_THREADS"],
    "folder": os.getcwd(),
    "leads": os.getpgid(0) == os.getpid(),
    "gc": gc.isenabled(),
    "others": "mine" in globals(),
    "pid": os.getpid(),
}
mine = 1
print(json.dumps(about))
"""


def write(checkout, **sources):  # noqa: F811
    "Notebooks with these last cells, and their plan."
    (checkout / "nbs/study/01_table.ipynb").unlink(missing_ok=True)
    for name, source in sources.items():
        nb = nbformat.from_dict(NOTEBOOK)
        nb.cells = [nb.cells[1], new_code_cell("experiments = []", metadata={"tags": ["grid"]})]
        nb.cells.append(new_code_cell(source))
        nbformat.write(nb, checkout / f"nbs/study/{name}.ipynb")
    return runner.plan_study("small.yaml")


def said(name: str) -> dict:
    "What such a notebook has printed."
    cell = nbformat.read(f"figures/small/{name}.ipynb", 4).cells[-1]
    return eval(cell.outputs[0].text, {"true": True, "false": False})


def test_commands_do_not_wait_for_pytorch():
    code = "import sys; from mllm_compress.cli import app; print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "pandas", "numpy", "matplotlib"}
    assert not heavy & set(eval(found.stdout))


@linux
def test_what_a_forked_kernel_finds(checkout, monkeypatch):  # noqa: F811
    monkeypatch.chdir(checkout)
    plan = write(checkout, **dict.fromkeys(("01_one", "02_two", "03_three"), ABOUT))
    assert runner.run_notebooks(plan, "small.yaml", "local", workers=2) == []
    pids = set()
    for name in plan:
        about = said(name)
        pids.add(about.pop("pid"))
        assert about == {
            "imported": True,
            "threads": "1",
            "folder": str((checkout / "nbs/study").resolve()),
            "leads": True,
            "gc": True,
            "others": False,
        }
    assert len(pids) == 2  # a kernel of each worker, and one of them drew two
    assert forkserver._forkserver._forkserver_pid is None
    assert soon(lambda: not pids & set(alive(checkout)))


@linux
def test_after_a_kernel_that_died_comes_an_ordinary_one(checkout, monkeypatch):  # noqa: F811
    monkeypatch.chdir(checkout)
    slow = "import time\n\ntime.sleep(8)" + ABOUT
    died = "import os\n\nos._exit(3)"
    plan = write(checkout, **{"01_slow": slow, "02_died": died, "03_after": ABOUT})
    (problem,) = runner.run_notebooks(plan, "small.yaml", "local", workers=2)
    assert problem.startswith("02_died failed") and "Dead" in problem
    assert said("01_slow")["imported"] and not said("03_after")["imported"]
    assert not said("03_after")["others"]


@linux
def test_what_the_server_shares(checkout, monkeypatch):  # noqa: F811
    "Nothing that a process could take with it when it is killed."
    monkeypatch.chdir(checkout)
    processes.start_fork_server()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        server = pool.apply(os.getppid)
        assert server == forkserver._forkserver._forkserver_pid
        assert pool.apply(eval, ("'mllm_compress.study.figures' in __import__('sys').modules",))
        assert os.listdir(f"/proc/{server}/task") == [str(server)]
        assert "sem.mp" not in Path(f"/proc/{server}/maps").read_text()
    processes.stop_fork_server()


SHOWN = """
from tqdm import tqdm

for i in tqdm(range(3), disable=False):
    print("shown", i)
"""
DIED = (
    SHOWN
    + """
import os

tqdm.get_lock().acquire()
os._exit(3)
"""
)


@linux
def test_a_kernel_that_dies_while_it_shows_progress_blocks_nobody(
    checkout,  # noqa: F811
    monkeypatch,
):
    monkeypatch.chdir(checkout)
    plan = write(checkout, **{"01_died": DIED, "02_shown": SHOWN, "03_third": SHOWN})
    (problem,) = runner.run_notebooks(plan, "small.yaml", "local", workers=2)
    assert problem.startswith("01_died failed") and "Dead" in problem
    for name in ("02_shown", "03_third"):
        assert "shown 2" in Path(f"figures/small/{name}.ipynb").read_text()


@linux
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_command_that_fails_leaves_no_server(checkout, monkeypatch, workers):  # noqa: F811
    monkeypatch.chdir(checkout)
    write(checkout, **{"01_one": ABOUT, "02_two": ABOUT})
    started, start = [], processes.start_fork_server
    monkeypatch.setattr(studying, "start_fork_server", lambda: started.append(start()))
    found = CliRunner().invoke(app, ["study", "--profile", "no.yaml", "--workers", workers])
    assert found.exit_code == 2 and len(started) == (workers == "0")
    assert forkserver._forkserver._forkserver_pid is None
    assert alive(checkout) == [os.getpid()]


@linux
def test_a_server_of_somebody_else_is_left_alone(checkout, monkeypatch):  # noqa: F811
    monkeypatch.chdir(checkout)
    forkserver.ensure_running()
    theirs = forkserver._forkserver._forkserver_pid
    plan = write(checkout, **dict.fromkeys(("01_one", "02_two"), ABOUT))
    try:
        assert runner.run_notebooks(plan, "small.yaml", "local", workers=2) == []
        processes.start_fork_server()
        processes.stop_fork_server()
        assert forkserver._forkserver._forkserver_pid == theirs
        assert theirs in alive(checkout)
    finally:
        forkserver._forkserver._stop()
    assert not said("01_one")["imported"] and not said("02_two")["imported"]


@linux
def test_drawing_goes_on_without_the_fork_server(checkout, monkeypatch):  # noqa: F811
    monkeypatch.chdir(checkout)
    end = "import os\nimport signal\n\nos.kill({}, signal.SIGKILL)"
    processes.start_fork_server()
    server = forkserver._forkserver._forkserver_pid
    plan = write(checkout, **{"01_end": end.format(server), "02_two": ABOUT, "03_three": ABOUT})
    assert runner.run_notebooks(plan, "small.yaml", "local", workers=2) == []
    assert said("02_two")["imported"] and said("03_three")["imported"]


class Unused:
    "A spare that must not be started."

    used = False

    def start(self, *given):
        raise AssertionError(given)


@pytest.mark.parametrize(
    "cmd, why",
    [
        (["/bin/sh", "-m", "ipykernel_launcher", "-f", "file"], "another Python"),
        ([sys.executable, "-m", "xeus", "-f", "file"], "another kernel"),
        ([sys.executable, "-m", "ipykernel_launcher", "-f", "file"], "used before"),
    ],
)
def test_another_kernel_is_started_as_usual(monkeypatch, cmd, why):
    async def usual(self, cmd, **how):
        return {"usual": cmd}

    monkeypatch.setattr(forked_kernels.LocalProvisioner, "launch_kernel", usual)
    spare = Unused()
    spare.used = why == "used before"
    provisioner = forked_kernels.manager_with(spare).provisioner
    assert asyncio.run(provisioner.launch_kernel(cmd, env={})) == {"usual": cmd}


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_what_is_not_forked(monkeypatch, device):
    if device == "cpu":
        monkeypatch.setattr(processes.sys, "platform", "darwin")
    started = []
    monkeypatch.setattr(drawing, "Worker", lambda *how: started.append(how))
    monkeypatch.setattr(drawing, "start_fork_server", lambda: started.append("server"))
    drawing._drawing_worker("profile", Path("runs"), device)
    assert started == [("profile", Path("runs"), device, drawing._serve)]
    assert drawing._spare_of(device) is None


@linux
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_a_study_stopped_while_the_server_imports(checkout, monkeypatch, which):  # noqa: F811
    monkeypatch.chdir(checkout)
    write(checkout, **{"01_one": ABOUT, "02_two": ABOUT})
    run = Run(checkout, "--workers", "2")
    commands = lambda: {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive(checkout)}
    assert soon(lambda: any(b"forkserver" in text for text in commands().values()), 60)
    time.sleep(2)  # the command waits for the server, which needs longer
    run.signal(which) if which == signal.SIGINT else os.kill(run.pid, which)
    text = run.says(130)
    assert "Stopped. Finished results are kept" in text and "Traceback" not in text
    assert soon(lambda: alive(checkout) == [os.getpid()], 60), alive(checkout)


@linux
def test_the_first_process_is_protected_from_ctrl_c():
    code = (
        "import multiprocessing, signal\n"
        "from mllm_compress.utils.processes import without_interrupts\n"
        "if __name__ == '__main__':\n"
        "    pool = multiprocessing.get_context('spawn').Pool\n"
        "    with without_interrupts():\n"
        "        one = pool(1)\n"
        "    print(signal.SIGINT in one.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ())))\n"
        "    one.terminate()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["True"], found.stderr


@linux
def test_a_kernel_that_has_not_begun_is_ended(checkout, monkeypatch):  # noqa: F811
    "A signal to its group would find none, as the process does not lead one yet."
    code = (
        "from mllm_compress.study import drawing, forked_kernels as f\n"
        "f._become_kernel.__globals__['os'].setsid = lambda: __import__('time').sleep(600)\n"
        "spare = f.Spare()\n"
        "manager = f.manager_with(spare)\n"
        "manager.provisioner.process, manager.provisioner.pgid = spare, spare.pid\n"
        "drawing._ended(manager)\n"
        "print(spare.poll())\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.split() == [str(-signal.SIGKILL)], found.stderr


def test_a_kernel_that_ended_at_once_has_no_group():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = SimpleNamespace(process=process, pgid=None)
    removed = []
    manager = SimpleNamespace(
        provisioner=started, cleanup_connection_file=lambda: removed.append("connection file")
    )
    drawing._ended(manager)
    assert process.returncode == -signal.SIGKILL and removed == ["connection file"]

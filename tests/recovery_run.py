"""One small recovery as its own process: killed at a step, resumed, or over several processes."""

import copy
import json
import os
import signal
import sys

import torch

torch.set_num_threads(1)

from mllm_compress.anatomy.streaming import weights_hash
from mllm_compress.data.scenes import scene_data
from mllm_compress.recovery.config import RecoveryConfig
from mllm_compress.recovery.training import RecoveryTrainer, recover
from mllm_compress.zoo.models import load_model

options = json.loads(sys.argv[1])  # config, folder, save_every, kill_at, result, fsdp, dtype
if options.get("fsdp"):
    # accelerate shards on GPUs only; with this it shards over two CPU processes
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    start = AcceleratorState.__init__

    def as_if_on_gpus(self, *args, **kwargs):
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_XPU
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = as_if_on_gpus
torch.manual_seed(0)
teacher, processor = load_model("smoke-llava")
student = copy.deepcopy(teacher)
for p in student.model.language_model.parameters():
    p.data += 0.02 * torch.randn_like(p)
if "dtype" in options:
    # as the study's real models: frozen weights in half precision, what is trained in float32
    teacher, student = (m.to(getattr(torch, options["dtype"])) for m in (teacher, student))
    student.model.multi_modal_projector.float()

compute_loss, sharded = RecoveryTrainer.compute_loss, 0


def killed_at(self, *args, **kwargs):
    global sharded
    sharded = sum(hasattr(p, "full_tensor") for p in self.model.parameters())
    if self.state.global_step == options.get("kill_at", -1):
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_loss(self, *args, **kwargs)


RecoveryTrainer.compute_loss = killed_at
result = recover(
    student,
    teacher,
    scene_data("train", options.get("n", 12)),
    RecoveryConfig(**{"held_out": 0.0} | options["config"]),
    processor,
    folder=options.get("folder"),
    save_every=options.get("save_every"),
    device="cpu",
    progress=False,
    trainer=options.get("trainer", {}),
)
if int(os.environ.get("RANK", 0)) == 0:
    with open(options["result"], "w") as f:
        json.dump(
            {
                "weights": weights_hash(result.model),
                "history": result.history.to_dict("list"),
                "looks": None if result.looks is None else result.looks.to_dict("list"),
                "chosen": [result.best_step, result.lr],
                "sharded": sharded,
                "shapes": {
                    f"model.{name}": list(p.shape) for name, p in result.model.named_parameters()
                },
            },
            f,
        )

"""Which state of a recovery to return? Not part of `make bench`: fifteen minutes of one core.

tiny-llava is pruned by several recipes and trained in batches of 32, with a tenth of its samples
held out and without stopping early. A row is a look: what the held-out part says, and the retained
score on questions about *validation* scenes. Runs that hold nothing out have only
their first and their last state.

    python bench/compare/best_state.py [--seeds 3] [--questions 100]
"""

import argparse
import subprocess
from pathlib import Path

import pandas as pd
import torch
from transformers import TrainerCallback

from mllm_compress import data, evaluate, load_model, prune, recover
from mllm_compress.recovery import RecoveryConfig

OUT = Path(__file__).resolve().parents[2] / "figures" / "bench" / "best-state.csv"
KINDS = ("open", "hallucination", "perception", "cognition", "choice", "composition")
STARTS = {  # name -> (arguments of prune, learning rate, held-out shares)
    "paper, 50 %": ({"ratio": 0.5, "recipe": "paper", "shape": "uniform"}, 1e-3, (0.1, 0.0)),
    "refit, 50 %": ({"ratio": 0.5, "recipe": "recommended"}, 3e-4, (0.1, 0.0)),
    "refit, 15 %": ({"ratio": 0.15, "recipe": "recommended"}, 3e-4, (0.1,)),
    "refit, 15 %, high rate": ({"ratio": 0.15, "recipe": "recommended"}, 1e-3, (0.1,)),
    "paper, 15 %": ({"ratio": 0.15, "recipe": "paper"}, 1e-3, (0.1,)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=100, help="of each of six kinds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model("tiny-llava")
    batches = data.calibration_batches(data.small_data(n=500), processor, n=256)
    training, rows, kinds = data.small_data(n=2000), [], [f"scenes/{kind}" for kind in KINDS]
    commit = ["git", "-C", OUT.parent, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    asked = dict(benchmarks=kinds, limit=options.questions, split="validation")
    scores = lambda m: evaluate(m, processor, **asked).set_index("benchmark").score
    dense = scores(model)
    retained = lambda m: round(100 * float((scores(m) / dense).mean()), 2)
    for name, (how, lr, shares) in STARTS.items():
        start, _ = prune(model, batches, **how)
        untrained = retained(start)
        for seed in range(options.seeds):
            for share in shares:
                values = {0: untrained}

                class Watch(TrainerCallback):
                    def on_step_end(self, args, state, control, model=None, **kwargs):
                        step, last = state.global_step, state.max_steps
                        if step == last or share and step % -(-last // 10) == 0:
                            with torch.random.fork_rng(), torch.no_grad():
                                values[step] = retained(model.model.eval())
                            model.train()

                config = RecoveryConfig(
                    fraction=0.1, seed=seed, lr=lr, batch_size=32, held_out=share, patience=100
                )
                how = dict(progress=False, callbacks=(Watch(),))
                result = recover(start, model, training, config, processor, **how)
                looks = pd.DataFrame({"step": values.keys(), "retained": values.values()})
                if share:
                    looks = looks.merge(result.looks, on="step")
                held_out = round(share * result.samples / (1 - share))
                about = dict(start=name, seed=seed, samples=result.samples, held_out=held_out)
                about |= dict(questions=len(KINDS) * options.questions, commit=commit)
                rows.append(looks.assign(**about)[[*about, *looks]])
                pd.concat(rows).round(5).to_csv(OUT, index=False)
                print(looks.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()

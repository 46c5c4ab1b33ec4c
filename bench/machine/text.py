"""SmolLM2-135M and the texts that it is calibrated and tested on."""

from mllm_compress import zoo
from mllm_compress.data.calibration import calibration_batches
from mllm_compress.evaluation.likelihood import perplexity_row
from mllm_compress.study.texts import missing_text, text_data
from mllm_compress.zoo.weight_files import PACKAGED

NAME, TEXTS, WINDOW = "smollm2-135m", ("glosses", "quotes"), 128
FOREIGN = ("technical",)  # a manual: no calibration has its kind


def missing() -> str:
    "What is not on this machine, empty where nothing is."
    return PACKAGED[NAME].missing or next(filter(None, map(missing_text, TEXTS + FOREIGN)), "")


def load() -> tuple:
    "The dense model, in float32, and its tokenizer."
    return zoo.load_model(NAME)


def held_out(tokenizer, texts: tuple = TEXTS):
    "Windows of texts that neither scores nor refits see."
    return text_data(texts, "test", tokenizer, WINDOW)


def calibration(tokenizer, seed: int, n: int) -> list:
    "Batches of windows, drawn by a seed."
    data = text_data(TEXTS, "calibration", tokenizer, WINDOW)
    return calibration_batches(data, tokenizer, n=n, batch_size=8, seed=seed, max_length=WINDOW)


def perplexity(model, tokenizer, data, windows: int) -> float:
    "Perplexity per token of held-out text."
    row = perplexity_row(model, tokenizer, data, windows, batch_size=16, max_length=WINDOW)
    return float(row.score.iloc[0])

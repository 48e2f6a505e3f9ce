"""Train a tiny Llama from a folder of text: the kind of model in `examples/tiny-llama`.

    python examples/train_tiny_llama.py TEXT_FOLDER --output DIR --minutes 45
    python examples/train_tiny_llama.py TEXT_FOLDER --output DIR2 --resume-from DIR --learning-rate 1e-3 --seed 1

Every `.txt` file below the folder is read as UTF-8, with paragraphs separated by blank lines. The first run
trains the tokenizer as well; a run that resumes keeps the tokenizer and the geometry of the model it starts from
and begins a new learning rate schedule. Two CPU cores see about 9 million tokens of the default geometry in
45 minutes. DIR is a Hugging Face model directory with bfloat16 weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

END_OF_TEXT = "<|endoftext|>"
HEAD_DIM = 64
MAX_POSITIONS = 2048
MIN_VOCABULARY = 257  # 256 bytes and the end-of-text token
MAX_VOCABULARY = 2**16  # token ids are kept in 16 bits

DOCUMENT_CHARS = 8_000  # documents are cut at the first paragraph end beyond this
TOKENIZER_CHARS = 400_000  # read of each file; the merges settle long before
WARMUP_STEPS = 50
DECAY_FROM = 0.6  # the learning rate stays flat up to this share of the run, then falls in a line
FINAL_RATE = 0.02
PROGRESS_SECONDS = 10.0


class UsageError(Exception):
    """The arguments or the text cannot give a model; the message is meant for the user."""


@dataclass(frozen=True)
class Geometry:
    """The shape of a new model."""

    hidden_size: int = 256
    layers: int = 8
    intermediate_size: int = 768
    vocabulary: int = 4096

    def check(self) -> None:
        """Refuse what no Llama of this family can have, before any text is read."""
        if self.hidden_size < HEAD_DIM or self.hidden_size % HEAD_DIM:
            raise UsageError(f"--hidden-size must be a multiple of {HEAD_DIM}, got {self.hidden_size}")
        if self.layers < 1:
            raise UsageError(f"--layers must be at least 1, got {self.layers}")
        if self.intermediate_size < 1:
            raise UsageError(f"--intermediate-size must be at least 1, got {self.intermediate_size}")
        if not MIN_VOCABULARY <= self.vocabulary <= MAX_VOCABULARY:
            raise UsageError(f"--vocabulary must be {MIN_VOCABULARY} to {MAX_VOCABULARY}, got {self.vocabulary}")

    def config(self) -> LlamaConfig:
        """The Transformers configuration: one key/value head for every two heads where they pair up."""
        heads = self.hidden_size // HEAD_DIM
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=MAX_POSITIONS,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


@dataclass(frozen=True)
class Schedule:
    """How long to train and how fast: `steps` makes a run repeatable, `minutes` fits it to the machine."""

    minutes: float
    steps: int | None
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int

    def check(self) -> None:
        """Refuse settings that would fail, or do nothing, after the tokenizer has been trained."""
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps must be at least 1, got {self.steps}")
        if not self.minutes > 0:
            raise UsageError(f"--minutes must be above 0, got {self.minutes:g}")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, got {self.batch_size}")
        if not 2 <= self.sequence_length <= MAX_POSITIONS:
            raise UsageError(f"--sequence-length must be 2 to {MAX_POSITIONS}, got {self.sequence_length}")
        if not self.learning_rate > 0:
            raise UsageError(f"--learning-rate must be above 0, got {self.learning_rate:g}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done after `step` steps; 1 or more ends it."""
        return step / self.steps if self.steps is not None else seconds / (60 * self.minutes)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of a step: linear warm-up, a plateau, linear decay."""
        warmup_steps = WARMUP_STEPS if self.steps is None else max(1, min(WARMUP_STEPS, self.steps // 10))
        warmup = min(1.0, (step + 1) / warmup_steps)
        decay = min(1.0, (1.0 - progress) / (1.0 - DECAY_FROM))
        return self.learning_rate * warmup * max(FINAL_RATE, decay)


def read_texts(folder: Path) -> list[str]:
    """The text of every `.txt` file below `folder`, in the order of their names."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise UsageError(f"{folder} has no .txt file in it")
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
    if not any(text.strip() for text in texts):
        raise UsageError(f"{folder} has only empty .txt files in it")
    return texts


def documents(text: str) -> Iterator[str]:
    """Cut a text at paragraph ends into documents of about `DOCUMENT_CHARS`, so that shuffling mixes the books."""
    document: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        document.append(paragraph)
        length += len(paragraph)
        if length > DOCUMENT_CHARS:
            yield "\n\n".join(document)
            document, length = [], 0
    if document:
        yield "\n\n".join(document)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> FastTokenizer:
    """A byte-level BPE with SmolLM2's pre-tokenizer: digits one by one, then byte-level words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((text[:TOKENIZER_CHARS] for text in texts), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocabulary:
        raise UsageError(f"the text gives only {found} tokens: add text or lower --vocabulary to {found}")
    return FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
    )


def tokenize(texts: Sequence[str], tokenizer: FastTokenizer, seed: int) -> Tensor:
    """All documents in shuffled order as one row of token ids, each led by the end-of-text token."""
    shuffled = [document for text in texts for document in documents(text)]
    random.Random(seed).shuffle(shuffled)
    encode_batch = tokenizer.backend_tokenizer.encode_batch
    pieces = []
    for start in range(0, len(shuffled), 256):
        for encoding in encode_batch(shuffled[start : start + 256], add_special_tokens=False):
            pieces.append(np.array([tokenizer.bos_token_id, *encoding.ids], dtype=np.uint16))
    return torch.from_numpy(np.concatenate(pieces))


def batches(tokens: Tensor, schedule: Schedule) -> Iterator[Tensor]:
    """Batches int64 [batch, sequence + 1] without end: every sequence once, in a new order for each epoch."""
    length = schedule.sequence_length
    # the last target of a sequence is the first input of the next one
    count = (len(tokens) - 1) // length
    if count < schedule.batch_size:
        raise UsageError(
            f"the text is too short: it has {count} sequences of {length} tokens, one batch needs {schedule.batch_size}"
        )
    generator = torch.Generator().manual_seed(schedule.seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for index in range(0, count - schedule.batch_size + 1, schedule.batch_size):
            starts = order[index : index + schedule.batch_size, None] * length
            yield tokens[starts + torch.arange(length + 1)].long()


def train(model: LlamaForCausalLM, tokens: Tensor, schedule: Schedule) -> tuple[int, float]:
    """Train `model` in place with AdamW; returns the steps taken and the smoothed loss in nats per token."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        # norm weights are scales around one, and decay would pull them to zero
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    report = ProgressLine(schedule)
    started = time.monotonic()
    step, loss_mean = 0, float("nan")
    for batch in batches(tokens, schedule):
        progress = schedule.progress(step, time.monotonic() - started)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, progress)
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        loss_mean = loss.item() if step == 1 else 0.98 * loss_mean + 0.02 * loss.item()
        report.update(step, loss_mean, time.monotonic() - started)
    report.close()
    return step, loss_mean


class ProgressLine:
    """One line that rewrites itself on a terminal, and a new line now and then in a log file."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._terminal = sys.stderr.isatty()
        self._next = 0.0

    def update(self, step: int, loss: float, seconds: float) -> None:
        """Show the state after a step, unless the last report is too recent to be worth replacing."""
        if seconds < self._next:
            return
        self._next = seconds + (1.0 if self._terminal else PROGRESS_SECONDS)
        done = min(1.0, self._schedule.progress(step, seconds))
        tokens = step * self._schedule.batch_size * self._schedule.sequence_length
        line = f"{done:4.0%}  step {step}  loss {loss:.3f}  {tokens / seconds:,.0f} tokens/s"
        if self._terminal:
            line, end = f"\r{line:<70}", ""
        else:
            end = "\n"
        print(line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the cursor on a line of its own."""
        if self._terminal:
            print(file=sys.stderr)


def new_model(texts: Sequence[str], geometry: Geometry) -> tuple[LlamaForCausalLM, FastTokenizer]:
    """A model with random weights and a tokenizer trained on the text."""
    return LlamaForCausalLM(geometry.config()), train_tokenizer(texts, geometry.vocabulary)


def saved_model(folder: Path) -> tuple[LlamaForCausalLM, FastTokenizer]:
    """The model and the tokenizer of an earlier run."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is not a model directory: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.bos_token != END_OF_TEXT or len(tokenizer) > MAX_VOCABULARY:
        raise UsageError(f"{folder} is not a model of this script: its tokenizer is of another kind")
    # float32 while training: small updates vanish when they are added to bfloat16 weights
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def run(options: argparse.Namespace) -> str:
    """Train and save what the command line asks for; returns one sentence on what was made."""
    schedule = Schedule(**{field.name: getattr(options, field.name) for field in fields(Schedule)})
    schedule.check()
    asked = {field.name: getattr(options, field.name) for field in fields(Geometry)}
    asked = {name: value for name, value in asked.items() if value is not None}
    geometry = Geometry(**asked)
    geometry.check()
    if options.output.exists():
        raise UsageError(f"{options.output} exists already: choose another --output or remove it first")
    if options.resume_from is not None and asked:
        flag = "--" + next(iter(asked)).replace("_", "-")
        raise UsageError(f"{flag} cannot go with --resume-from: a model keeps its geometry")

    torch.manual_seed(schedule.seed)
    texts = read_texts(options.text_folder)
    if options.resume_from is None:
        model, tokenizer = new_model(texts, geometry)
    else:
        model, tokenizer = saved_model(options.resume_from)
    tokens = tokenize(texts, tokenizer, schedule.seed)
    steps, loss = train(model, tokens, schedule)
    model.to("cpu", torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    seen = steps * schedule.batch_size * schedule.sequence_length
    return (
        f"{options.output}: {model.num_parameters() / 1e6:.1f} M parameters, {steps} steps, "
        f"{seen:,} tokens seen (the text has {len(tokens):,}), loss {loss:.2f} nats per token"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Geometry()
    result = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("text_folder", type=Path, metavar="TEXT_FOLDER", help="folder with .txt files")
    add("--output", type=Path, required=True, metavar="DIR", help="model directory to make")
    add("--minutes", type=float, default=45.0, help="length of the training, after the text is read (%(default)s)")
    add("--steps", type=int, help="train for this many steps instead, whatever time they take")
    # no defaults here: --resume-from must know whether a geometry was asked for
    add("--hidden-size", type=int, help=f"multiple of {HEAD_DIM} ({new.hidden_size})")
    add("--layers", type=int, help=f"decoder layers ({new.layers})")
    add("--intermediate-size", type=int, help=f"feed-forward width ({new.intermediate_size})")
    add("--vocabulary", type=int, help=f"tokens of the byte-level BPE ({new.vocabulary})")
    add("--batch-size", type=int, default=32, help="sequences per step (%(default)s)")
    add("--sequence-length", type=int, default=256, help="tokens per sequence (%(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="between warm-up and decay (%(default)s)")
    add("--seed", type=int, default=0, help="of the first weights and of the order of the text (%(default)s)")
    add("--resume-from", type=Path, metavar="DIR", help="train a model of this script further")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an input at fault is one sentence on stderr and status 1."""
    options = parser().parse_args(arguments)
    try:
        print(run(options))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

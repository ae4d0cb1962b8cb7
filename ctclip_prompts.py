"""Findings in words: what CT-CLIP (zero-shot) and VocabFine classify with, made into a linear head once per file.

Legend   n findings, S tokens of the longest prompt, L latent.

Ladder   finding -> "{finding} is present." and "{finding} is not present." -> tokens (2n, S) -> the checkpoint's BERT,
         last hidden state at [CLS] -> `to_text_latent` (no bias), L2-normalised -> text latents (2n, L) ->
         weight (n, L) = exp(temperature) * (present - absent).

p(present) is published as the softmax over a pair of similarities exp(temperature) * (image latent . text latent). That
is the sigmoid of (weight . image latent): no text is encoded at prediction time, and the image latent has no ReLU.

Two things are needed that a classifier otherwise does without: the package transformers (its BertModel, and tokenizers,
which comes with it), and the vocabulary of the text tower, one file of a public model repository. What they make is
kept beside the weights, so that BERT runs once.
"""

from __future__ import annotations

import errno
import hashlib
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ctclip_hub import VOCABULARY_REPOSITORY, vocabulary_path

if TYPE_CHECKING:
    from transformers import BertModel

TOWER = "text_transformer."
EXCUSED = ("embeddings.position_ids", "pooler.")  # counts 0, 1, 2, ...; and what the published code does not call
ATTENTION_HEADS = {768: 12, 24: 2}  # by width: no shape tells them. BERT's base size, and the tests'
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
RESERVED = (*SPECIAL, "[MASK]")  # read as signs of BERT's own where a text has them
UNREAD = ("Mn", "Cc", "Cf", "Cn", "Co", "Cs")  # Unicode categories that BERT's tokeniser drops: accents, control
BATCH = 12  # prompts encoded at once: 36 of them take a second, and their activations next to no memory
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
RECIPE = "1"  # of the kept heads: to be raised when the same tensors and texts would give another head

Writer = Callable[[Path], AbstractContextManager[Path]]


class PromptError(ValueError):
    """Prompts that cannot be made or used. One line: what was found, what was expected, what to do."""


# ---- the texts


@dataclass(frozen=True)
class Prompts:
    """n findings and, for each, a text that says that it is there and one that says that it is not.

    Raises PromptError for no finding at all, one whose name or text has nothing that the text tower reads, one that
    occurs twice as it is read, and a text with one of BERT's own signs.
    """

    names: tuple[str, ...]
    present: tuple[str, ...]
    absent: tuple[str, ...]

    def __post_init__(self):
        if not self.names or not len(self.names) == len(self.present) == len(self.absent):
            counts = f"{len(self.names)} findings, {len(self.present)} texts for and {len(self.absent)} against"
            raise PromptError(f"found {counts}, expected at least one finding and two texts for each; complete them")
        if not all(as_read(text) for text in self.names + self.present + self.absent):
            raise PromptError("found a finding or a text that is empty, expected words; complete it")
        seen = [as_read(name) for name in self.names]
        twice = next((name for name, read in zip(self.names, seen, strict=True) if seen.count(read) > 1), None)
        if twice is not None:
            found = f"found '{twice}' twice, expected every finding once"
            raise PromptError(f"{found} (neither case nor accents are read); remove one")
        for name, *texts in zip(self.names, self.present, self.absent, strict=True):
            sign = next((sign for sign in RESERVED if any(sign in text for text in texts)), None)
            if sign is not None:
                found = f"found {sign} in a text of '{name}', expected words"
                raise PromptError(f"{found}, because that is a sign of the text tower's own; word it otherwise")

    @classmethod
    def of(cls, names: Sequence[str]) -> Prompts:
        """The published wording for these findings."""
        names = tuple(names)
        return cls(names, tuple(f"{name} is present." for name in names), tuple(f"{n} is not present." for n in names))

    def pairs(self) -> list[str]:
        """(2n) texts, present and absent in turn."""
        return [text for pair in zip(self.present, self.absent, strict=True) for text in pair]


def as_read(text: str) -> str:
    """What the text tower reads of a text: no case, accents, control or invisible signs, single spaces."""
    spaced = " ".join(unicodedata.normalize("NFD", text).split())
    kept = (sign for sign in spaced if unicodedata.category(sign) not in UNREAD and sign != "\ufffd")
    return "".join(kept).strip().lower()


def read_prompts(path: str | os.PathLike) -> Prompts:
    """A text file of findings, UTF-8: one per line, or `finding<TAB>text if present<TAB>text if absent`.

    Blank lines and lines that begin with # are left out. Raises PromptError, naming the file and the line.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Windows' editors begin with a mark
    except FileNotFoundError as error:
        raise PromptError(f"{path}: found no such file, expected one finding per line; check the path") from error
    except OSError as error:
        raise PromptError(f"{path}: found it unreadable ({error.strerror}), expected a text file; check it") from error
    except UnicodeDecodeError as error:
        found = f"{path}: found bytes that are not UTF-8 (at {error.start})"
        raise PromptError(f"{found}, expected a text file; save it as UTF-8") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) not in (1, 3) or not all(parts):
            found = f"{path}, line {number}: found {len(parts)} parts between tabs" + ", one empty" * (not all(parts))
            raise PromptError(f"{found}, expected a finding, or finding, text if present, text if absent; correct it")
        try:
            finding = Prompts.of(parts) if len(parts) == 1 else Prompts(*((part,) for part in parts))
        except PromptError as error:
            raise PromptError(f"{path}, line {number}: {error}") from error
        rows.append((*finding.names, *finding.pairs()))
    if not rows:
        raise PromptError(f"{path}: found no finding, expected one per line; add some")
    try:
        return Prompts(*(tuple(column) for column in zip(*rows, strict=True)))
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from error


# ---- tokens


@dataclass(frozen=True)
class Vocabulary:
    """The word pieces of a text tower, in the order of its embedding's rows, and the file they are from."""

    path: Path
    pieces: tuple[str, ...]
    content: bytes

    @classmethod
    def read(cls, path: str | os.PathLike) -> Vocabulary:
        """vocab.txt: one piece per line. Raises PromptError where it is absent, no text or not BERT's."""
        path = Path(path)
        try:
            content = path.read_bytes()
            pieces = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        except FileNotFoundError as error:
            raise PromptError(
                f"found no vocabulary at {path}, expected vocab.txt of {VOCABULARY_REPOSITORY}; to fetch it into "
                "models/: python ctclip_setup.py --model zeroshot (or vocabfine)"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{path}: found no text ({error}), expected a vocabulary; fetch it again") from error
        lacking = [piece for piece in SPECIAL if piece not in pieces]
        if lacking:
            found = f"{path}: found a vocabulary without {', '.join(lacking)}"
            raise PromptError(f"{found}, expected BERT's; fetch {VOCABULARY_REPOSITORY}'s vocab.txt again")
        return cls(path, tuple(pieces), content)


def tokenise(prompts: Prompts, vocabulary: Vocabulary, positions: int) -> tuple[Tensor, Tensor]:
    """-> ids and mask (2n, S) int64, rows present and absent in turn: BERT's [CLS], lower-cased word pieces, [SEP].

    No word is cut off or passed over: raises PromptError for a text of more than `positions` tokens, and for one with
    signs that the vocabulary does not know. Case, accents, control and invisible signs are not read: see `as_read`.
    """
    with _optional():
        from tokenizers import BertWordPieceTokenizer
    table = {piece: row for row, piece in enumerate(vocabulary.pieces)}
    encoded = BertWordPieceTokenizer(table, lowercase=True).encode_batch(prompts.pairs())
    for row, found in enumerate(encoded):
        name = prompts.names[row // 2]
        if len(found.ids) > positions:
            said = f"found {len(found.ids)} tokens in a text of '{name}', expected at most {positions}"
            raise PromptError(f"{said}, which is all that the text tower takes; shorten it")
        if "[UNK]" in found.tokens:
            said = f"found words in a text of '{name}' that the text tower's vocabulary cannot spell"
            raise PromptError(f"{said}, expected English; word it otherwise")
    longest = max(len(found.ids) for found in encoded)
    ids = torch.full((len(encoded), longest), table["[PAD]"], dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, found in enumerate(encoded):
        ids[row, : len(found.ids)] = torch.tensor(found.ids)
        mask[row, : len(found.ids)] = 1
    return ids, mask


# ---- the text tower


@contextmanager
def _optional() -> Iterator[None]:
    """Around an import of transformers or tokenizers: absent, or too old for this torch, is one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PromptError(
            f"found no usable transformers ({reason}), expected the package, which encodes the prompts; "
            "pip install transformers"
        ) from error


@contextmanager
def _quiet(logging) -> Iterator[None]:
    """transformers' `logging` says nothing but errors inside the block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def tower_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a checkpoint's text tower that are computed with, under BertModel's names.

    `state`: prefixes removed, as `ctclip_model.read_checkpoint` gives it. Raises PromptError where there are none.
    """
    tensors = {
        key.removeprefix(TOWER): value
        for key, value in state.items()
        if key.startswith(TOWER) and not key.removeprefix(TOWER).startswith(EXCUSED)
    }
    if not tensors or "to_text_latent.weight" not in state or "temperature" not in state:
        raise PromptError(
            "found no text tower in the file, expected one, because prompts are encoded by it; "
            "use a zero-shot or VocabFine file"
        )
    return tensors


def bert_sizes(tensors: dict[str, Tensor]) -> dict[str, int]:
    """BertConfig's sizes, read off the shapes; the attention heads by the width. Raises PromptError."""

    def shape(key: str) -> torch.Size:
        if key not in tensors or tensors[key].ndim != 2:
            raise PromptError(f"found no matrix {TOWER}{key} in the file, expected BERT's; fetch the file again")
        return tensors[key].shape

    words, width = shape("embeddings.word_embeddings.weight")
    if width not in ATTENTION_HEADS:
        known = " or ".join(map(str, ATTENTION_HEADS))
        found = f"found a text tower of width {width}, expected {known}"
        raise PromptError(f"{found}: a file does not tell its attention heads; add them to ATTENTION_HEADS")
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": len({key.split(".")[2] for key in tensors if key.startswith("encoder.layer.")}),
        "num_attention_heads": ATTENTION_HEADS[width],
        "intermediate_size": shape("encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape("embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape("embeddings.token_type_embeddings.weight")[0],
    }


def text_tower(state: dict[str, Tensor]) -> BertModel:
    """The checkpoint's BERT in float32 and evaluation mode, on its tensors as they are in memory (or mapped there).

    Raises PromptError for a tensor too many, too few or of another shape.
    """
    tensors = {key: value.float() for key, value in tower_tensors(state).items()}
    sizes = bert_sizes(tensors)
    with _optional():
        from transformers import BertConfig, BertModel
        from transformers.utils import logging

        with _quiet(logging), torch.device("meta"):  # no memory, no random numbers
            tower = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    wanted, found = ({key: value.shape for key, value in side.items()} for side in (tower.state_dict(), tensors))
    strange = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if strange:
        some = f"{TOWER}{strange[0]}" + f" and {len(strange) - 1} more" * (len(strange) > 1)
        raise PromptError(f"found tensors missing, extra or misshapen ({some}), expected BERT's; fetch the file again")
    tower.load_state_dict(tensors, assign=True)
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def text_latents(state: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids and mask (n, S), int64, 1 where there is a token -> latents (n, L) float32, L2-normalised.

    How many tokens of padding there are changes nothing. Raises PromptError where `state` has no usable text tower.
    """
    tower, projection = text_tower(state), state["to_text_latent.weight"].float()
    rows = []
    for part, seen in zip(ids.split(BATCH), mask.split(BATCH), strict=True):
        places = torch.arange(part.shape[1]).expand_as(part)  # given, because the tower's own are on no device
        hidden = tower(
            input_ids=part, attention_mask=seen, token_type_ids=torch.zeros_like(part), position_ids=places
        ).last_hidden_state  # (n, S, width)
        rows.append(F.normalize(F.linear(hidden[:, 0], projection), dim=-1))
    return torch.cat(rows)


def pair_weights(latents: Tensor, temperature: Tensor) -> Tensor:
    """Text latents (2n, L), present and absent in turn -> weight (n, L) of a linear head on image latents."""
    return temperature.float().reshape(()).exp() * (latents[0::2] - latents[1::2])


def prompt_weights(state: dict[str, Tensor], prompts: Prompts, vocabulary: Vocabulary) -> Tensor:
    """-> weight (n, L) float32 of a linear head without bias on L2-normalised image latents; its sigmoid is p(present).

    `state`: of a CT-CLIP file, prefixes removed. Raises PromptError.
    """
    sizes = bert_sizes(tower_tensors(state))
    if len(vocabulary.pieces) != sizes["vocab_size"]:
        raise PromptError(
            f"{vocabulary.path}: found {len(vocabulary.pieces)} lines, expected {sizes['vocab_size']}, one for each "
            f"row of the file's word embeddings; fetch {VOCABULARY_REPOSITORY}'s vocab.txt again"
        )
    ids, mask = tokenise(prompts, vocabulary, sizes["max_position_embeddings"])
    return pair_weights(text_latents(state, ids, mask), state["temperature"])


# ---- kept beside the weights


def head_digest(state: dict[str, Tensor], prompts: Prompts, vocabulary: Vocabulary) -> str:
    """SHA-256 of all that `prompt_weights` depends on. At the published size 0.44 GB are read."""
    digest = hashlib.sha256(RECIPE.encode())
    used = tower_tensors(state) | {key: state[key] for key in ("to_text_latent.weight", "temperature")}
    for key, tensor in sorted(used.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(hashlib.sha256(vocabulary.content).digest())
    digest.update(repr(asdict(prompts)).encode())
    return digest.hexdigest()


def kept_path(weights: Path, digest: str) -> Path:
    return weights.with_name(f"{weights.stem}.prompts_{digest[:12]}.safetensors")


def prompt_head(weights: Path, state: dict[str, Tensor], prompts: Prompts, replacing: Writer) -> Tensor:
    """`prompt_weights` of the file at `weights`, kept in a small file beside it and taken from there the next time.

    Then no transformers is needed, and no text encoded. The vocabulary is looked for beside the weights, too. Where the
    folder cannot be written to, the head is made anew each time. `replacing`: ctclip_model's, writes a file whole.
    Raises PromptError.
    """
    tower_tensors(state)  # first: without it nothing else matters
    vocabulary = Vocabulary.read(vocabulary_path(weights))
    digest = head_digest(state, prompts, vocabulary)
    path = kept_path(weights, digest)
    weight = _kept(path, digest)
    if weight is None:
        weight = prompt_weights(state, prompts, vocabulary)
        _keep(path, weight, digest, replacing)
    return weight


def _fingerprint(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()


def _kept(path: Path, digest: str) -> Tensor | None:
    """The head kept at `path`; None where there is none, or one that is damaged or of something else."""
    try:
        with safe_open(path, framework="pt") as file:
            weight, notes = file.get_tensor("weight"), file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return weight if notes == {"digest": digest, "content": _fingerprint(weight)} else None


def _keep(path: Path, weight: Tensor, digest: str, replacing: Writer) -> None:
    weight = weight.contiguous()
    content = save({"weight": weight}, metadata={"digest": digest, "content": _fingerprint(weight)})
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise

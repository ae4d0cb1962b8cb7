"""CT-CLIP's two towers (image, text), slice backbones, video ResNets, classification heads, losses and the loading of
weights.

This file works alone: copied into another project it needs torch and timm (which brings huggingface_hub and
safetensors), and for prompts transformers. It imports nothing else of this project; every script imports it.

    from ctclip_model import CTCLIPMultiAbnormalityModel, create_balanced_loss
    model = CTCLIPMultiAbnormalityModel("models/ctclip_classfine.pt").eval()
    logits = model(volume)                  # (B, 1, D, H, W), HU / 1000 in [-1, 1]  ->  (B, 18)

    python ctclip_model.py                  runs every variant whose weights are there on one input

Legend   B batch, D H W voxels (D slices, then the two in-plane axes: x, y), T h w tokens (T = D / temporal patch,
         h = w = in-plane size / patch), C width, N heads, K head width, L latent, S slices of a volume.
         "Heads" of the transformers are N; "the head" is the classifier on top.

Shapes   volume (B, 1, D, H, W)  ->  patches (B, T, h, w, C)  ->  spatial transformer over h*w  ->  temporal
         transformer over T  ->  nearest codebook rows (B, T, h, w, C)  ->  mean over T, one linear map  ->
         latent (B, L), L2-normalised  ->  ReLU, dropout, linear  ->  logits (B, 18).
         Head "mlp" adds a small network to the last step. Head "attention" does not use the latent: each label pools
         the codebook rows (B, T, h, w, C), or a slice backbone's tokens (B, S, h, w, C), by an attention of its own  ->
         logits (B, 18). Head "prompts", computed by the text tower (see there), takes the latent without ReLU  ->
         logits (B, n) of n findings.
         Published size: (B, 1, 240, 480, 480) -> T = h = w = 24, C = 512, N = 8, K = 32, 8192 codes, L = 512.

Attribute names of the tower (`visual_transformer`, `enc_spatial_transformer`, `layers.0.1.to_q`, `vq._codebook.embed`,
...) are dictated by the published checkpoint, so that its keys load as they are; `WRAPPERS` and `UNUSED_KEYS` say what
is stripped or dropped. The architecture is that of Hamamci et al., "Developing Generalist Foundation Models
from a Multimodal Dataset for 3D Computed Tomography" (CT-CLIP); the code is our own.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Ctrl-C, during the imports too, ends without a traceback
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

import argparse
import hashlib
import html
import inspect
import json
import math
import os
import pickle
import re
import ssl
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from http.client import HTTPException
from itertools import product
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.error import HTTPError
from urllib.request import urlopen

try:
    import torch
    import torch.nn.functional as F
    from huggingface_hub import PyTorchModelHubMixin
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    from torch import Tensor, nn
    from torch.autograd.function import once_differentiable
    from torch.utils.checkpoint import checkpoint
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        sys.stderr.write(f"error: {error}, expected torch and timm; run python ctclip_setup.py\n")
        sys.exit(2)
    raise

if TYPE_CHECKING:
    from transformers import BertModel

__version__ = "0.7.0"  # of ctclip; a copy of this file keeps it

ABNORMALITIES = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
N_LABELS = len(ABNORMALITIES)
UNKNOWN = -1  # a label that nobody stated: left out of losses and metrics

CLASSFINE_PATH = "models/ctclip_classfine.pt"
_HERE = Path(__file__).resolve().parent
# Comes with the code: in models/ of a checkout, in the package where that is installed (pyproject.toml).
DEMO_PATH = str(_HERE / ("ctclip/demo" if (_HERE / "ctclip" / "demo").is_dir() else "models") / "ctclip_demo.pt")
PHANTOM_WEIGHTS = "ctclip_demo"  # CTCLIPMultiAbnormalityModel.derived_from, where the tower was trained on phantoms
# Names that may be written into a saved model as its origin; any other name or path may be private.
PUBLISHED_FILES = (
    PHANTOM_WEIGHTS, "ctclip_classfine", "ctclip_vocabfine", "ctclip_zeroshot",
    "CT_LiPro_v2", "CT_VocabFine_v2", "CT-CLIP_v2",
)  # fmt: skip

# Names that wrappers (DataParallel, torch.compile, FSDP, ClassFine) put into keys; removed wherever they are.
WRAPPERS = {"module", "trained_model", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
            "_checkpoint_wrapped_module"}  # fmt: skip

# Keys that may be in a file and that an image classifier does not use, with the reason. Any other key that it does not
# use is an error.
UNUSED_KEYS = (
    ("text_transformer.", "text tower"),
    ("to_text_latent", "text tower"),
    ("temperature", "text tower"),
    ("to_visual_latent_extra.", "unused copy"),
    (".to_patch_emb_first_frame.", "no part in the forward pass"),
    (".to_pixels", "no part in the forward pass"),
    (".context_norm.", "no part in the forward pass"),
    (".null_kv", "no part in the forward pass"),
    ("._codebook.", "codebook training statistics"),  # all but the codebook itself, which the model has
    ("criterion.", "settings of a loss"),
    ("loss_fn.", "settings of a loss"),
)

AS_TENSORS = "make tensors of its arrays (torch.from_numpy), and save a dictionary of them by torch.save"
ONE_FILE = "put the tensors of all shards into one dictionary, and save that by safetensors.torch.save_file"
SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.(safetensors|bin|pt|pth)", re.IGNORECASE)  # in a name; of several
SCALARS = (bool, int, float, str, bytes, type(None))  # what training code saves among tensors: epoch, best
LABEL_KEYS = ("labels", "label_names", "label2id", "id2label", "classes", "class_names", "class_to_idx", "findings",
              "abnormalities", "pathologies", "target_names")  # of lists that name the rows of a head
# How files begin that get into the place of weights; what they are, and what to do.
OTHER_FILES = (
    (b"version https://git-lfs", "a git-LFS pointer, which only stands for the weights", "git lfs pull fetches them"),
    (b"<", "a web page (HTML or XML)", "read what it says, then download the weights again"),
    (b"{", "JSON text", "name the weights that it belongs to"),
    (b"\x93NUMPY", "a NumPy array (.npy)", AS_TENSORS),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x89HDF", "an HDF5 file", "save its tensors by torch.save"),
    (b"\0" * 16, "zeros, as a broken download leaves them", "download it again"),
)
# Objects of these packages stand beside the tensors of many training states. They are passed over: never imported.
INERT_PACKAGES = ("argparse", "pathlib", "datetime", "numpy", "_codecs", "builtins.bytes")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of numbers that need no scale beside them
HUGE_WEIGHT = 1e6  # trained weights lie far below; products of larger ones overflow
MOST_NESTED = 4  # dictionaries around the weights of a training state

READ_AT_ONCE = 2**24  # numbers copied from one mapping of a file: 67 MB in float32
ONE_THREAD = 2**14  # numbers that torch copies in one thread; several would wait for each other's page faults

SAVED_WEIGHTS = "model.safetensors"  # beside config.json
WRITTEN = "files.jsonl"  # in a folder: which files of it this project wrote, with their digests

SLIM_OF = "slim_of"  # in the header of a slim copy: the name of the file it was made from

TOWER = "visual_transformer"
FIRST_FRAME = f"{TOWER}.to_patch_emb_first_frame.1.weight"  # not used, but of all tensors it alone tells the patch
LINEAR_HEAD_KEYS = ("classifier.weight", "classifier.bias")  # ClassFine's
NEW_HEAD_FLAG = "--init-head new"

HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")  # of snapshot_download

FIELD_OF_VIEW_MM = 360.0  # edge of the cube that every volume covers, whatever its number of voxels
SLICE_INPUT_SHAPE = (120, 224, 224)  # volumes for slice backbones: 3 x 1.6 x 1.6 mm, unless they are told otherwise
WINDOWS = {"lung": (-600, 1500), "mediastinum": (40, 400), "bone": (400, 1800)}  # level and width in HU
HUB_SOURCES = ("hf-hub", "hf_hub")  # timm's, before the colon of a name
NOT_OF_ARCHITECTURES = ("num_classes", "global_pool", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
                        "checkpoint_path", "cache_dir")  # among a folder's arguments; some read other files
TIMM_WEIGHTS = (SAVED_WEIGHTS, "pytorch_model.bin")  # beside the config.json of a folder in timm's layout
VIDEO_MODELS = ("r3d_18", "mc3_18", "r2plus1d_18")  # torchvision's
VIDEO_SLICES, VIDEO_SIZE = 120, 240  # of their volumes: 3 x 1.5 x 1.5 mm, unless they are told otherwise
VIDEO_WINDOW = "-1000:200"  # HU
STEM_STRIDES, TEST_CROPS = (2, 4), (1, 8)


class ModelError(Exception):
    """Base of this module's errors. One line: what was found, what was expected, what to do."""

    exit_code = 2  # of a command that ends with it


class CheckpointError(ModelError, ValueError):
    """A weights file that cannot be used."""


class MisfitError(CheckpointError, RuntimeError):
    """A saved model's two files that do not fit each other: torch's RuntimeError, in one line."""


class PromptError(ModelError, ValueError):
    """Prompts that cannot be made or used."""


class PretrainedWeightsError(ModelError, RuntimeError):
    """Weights of a backbone that cannot be had; the message names the way on."""


def _first_sentence(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


# -- Image tower -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a CT-CLIP image tower; every one is read off the shapes in a checkpoint."""

    dim: int
    heads: int
    dim_head: int
    patch: int
    temporal_patch: int
    grid: int  # h = w
    spatial_depth: int
    temporal_depth: int
    codes: int
    latent: int
    feedforward: int
    bias_dim: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(D, H, W) in voxels. The depth is free in steps of `temporal_patch`; a cubic token grid is the default."""
        return self.grid * self.temporal_patch, self.grid * self.patch, self.grid * self.patch

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], patch: int | None = None) -> TowerSizes:
        """Sizes from the tensors of a checkpoint whose prefixes are already removed.

        `patch`: the in-plane patch, where it is known. Only a tensor that is not used tells it; a state dict of this
        module's model lacks that one, and is taken to have CT-CLIP's patches, twice as wide as deep.
        Raises CheckpointError when a tensor that carries a size is missing or two of them disagree.
        """

        def shape(key: str, axes: int) -> torch.Size:
            if key not in state:
                raise CheckpointError(
                    f"'{key}' is not in the file (it has {len(state)} tensors): not a CT-CLIP checkpoint. "
                    "Expected CT-CLIP, VocabFine or ClassFine weights; run python ctclip_setup.py"
                )
            found = state[key].shape
            if len(found) != axes or 0 in found:
                raise CheckpointError(f"{key} is {tuple(found)}, expected {axes} axes of at least 1: the file is "
                                      "damaged or not a CT-CLIP checkpoint; fetch it again")  # fmt: skip
            return found

        def depth(name: str) -> int:
            start = f"visual_transformer.{name}.layers."
            return len({key[len(start) :].split(".")[0] for key in state if key.startswith(start)})

        tower = "visual_transformer."
        layer = tower + "enc_spatial_transformer.layers.0."
        dim = shape(tower + "enc_spatial_transformer.norm_out.gamma", 1)[0]
        voxels = shape(tower + "to_patch_emb.1.weight", 1)[0]
        if patch is None and FIRST_FRAME in state:
            patch = math.isqrt(shape(FIRST_FRAME, 1)[0])
        elif patch is None:
            patch = 2 * round((voxels / 4) ** (1 / 3))
            voxels = voxels if 2 * voxels == patch**3 else 0
        if patch < 1 or voxels < patch**2 or voxels % patch**2:
            raise CheckpointError(
                f"{tower}to_patch_emb.1.weight does not tell the size of a patch, expected {FIRST_FRAME} beside it; "
                "save such a model with save_pretrained(FOLDER)"
            )
        latent, flat = shape("to_visual_latent.weight", 2)
        grid = math.isqrt(flat // dim)
        if grid**2 * dim != flat:
            raise CheckpointError(
                f"to_visual_latent has {flat} inputs, expected a square token grid times width {dim}: "
                "the file is damaged or not a CT-CLIP checkpoint"
            )
        return cls(
            dim=dim,
            heads=shape(tower + "spatial_rel_pos_bias.net.2.weight", 2)[0],
            dim_head=shape(layer + "1.q_scale", 1)[0],
            patch=patch,
            temporal_patch=voxels // patch**2,
            grid=grid,
            spatial_depth=depth("enc_spatial_transformer"),
            temporal_depth=depth("enc_temporal_transformer"),
            codes=shape(tower + "vq._codebook.embed", 3)[1],
            latent=latent,
            feedforward=shape(layer + "3.4.weight", 2)[1],
            bias_dim=shape(tower + "spatial_rel_pos_bias.net.0.0.weight", 2)[0],
        )


def is_plain_cpu(x: Tensor) -> bool:
    """Whether the tower may run in chunks, through oneDNN and with gradients of its own: float32 on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # nor exporting
    )


def is_plain_cpu_inference(x: Tensor) -> bool:
    """Whether it may also work in place, without gradients."""
    return is_plain_cpu(x) and not torch.is_grad_enabled()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by oneDNN, without a gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """F.linear whose forward product, and the one for the gradient of x, go through oneDNN; MKL is the faster one for
    that of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.T) if of_x else None,
            rows.T @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by oneDNN in float32 on a CPU.

    oneDNN was faster than MKL, which F.linear uses, on an AMD EPYC: by a tenth, with the 2,730 outputs of the
    feed-forward by half (LOG.md). `_linear_pointwise` is what compiled models call; without it, F.linear is used.
    """
    available = torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not available or not is_plain_cpu(x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer of the transformers."""

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm under the checkpoint's names: `gamma` is learned, `beta` is a fixed buffer of zeros."""

    beta: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class PEG(nn.Module):
    """Position encoding by a depthwise 3x3x3 convolution, causal along depth."""

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, grid_shape: tuple[int, int, int, int]) -> Tensor:
        """x (any leading shape, C) is *viewed*, never permuted, as (B, T, h, w, C).

        For the temporal transformer, laid out (B*h*w, T, C), that view mixes the axes up. The published weights were
        trained with it, so it has to stay.
        """
        tokens = x.reshape(*grid_shape, x.shape[-1])
        filtered = _PositionFilter.apply if is_plain_cpu(x) and torch.is_grad_enabled() else _position_filter
        return filtered(tokens, self.dsconv.weight, self.dsconv.bias).reshape(x.shape)


def _position_filter(tokens: Tensor, weight: Tensor, bias: Tensor | None, causal: bool = True) -> Tensor:
    """(B, T, h, w, C) -> the same shape: depthwise 3x3x3 of the two slices before and this one, or, not causal, of this
    one and the two after."""
    # Two zeros at both ends of the depth, two outputs cut off: padding apart would cost a copy in another layout.
    channels_first = tokens.movedim(-1, 1)  # channels last in memory
    filtered = F.conv3d(channels_first, weight, bias, padding=(2, 1, 1), groups=weight.shape[0]).movedim(1, -1)
    return filtered[:, :-2] if causal else filtered[:, 2:]


class _PositionFilter(torch.autograd.Function):
    """`_position_filter` whose gradients take a fifth of the time of torch's, which are written for few channels."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return _position_filter(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        of_tokens, of_weight, of_bias = ctx.needs_input_grad
        return (
            _position_filter(grad, weight.flip(2, 3, 4), None, causal=False) if of_tokens else None,
            _position_filter_weight(tokens, grad).view_as(weight) if of_weight else None,
            grad.sum((0, 1, 2, 3)) if of_bias else None,
        )


FILTER_VALUES = 300_000  # 1.2 MB: a slice of 24 x 24 tokens of the published width, all slices of the demo's


def _position_filter_weight(tokens: Tensor, grad: Tensor) -> Tensor:
    """(B, T, h, w, C) twice -> (C, 27): the gradient of the filter's weights, a few slices at a time, so that these
    stay in the cache."""
    h, w, C = grad.shape[2:]
    padded, at_once = F.pad(tokens, (0, 0, 1, 1, 1, 1, 2, 0)), max(1, FILTER_VALUES // (h * w * C))
    total = tokens.new_zeros(3, 3, 3, C)
    for volume, of_volume in zip(padded, grad, strict=True):
        for start, of_slices in zip(range(0, len(of_volume), at_once), of_volume.split(at_once), strict=True):
            for dt, dy, dx in product(range(3), repeat=3):
                first = start + dt
                here = volume[first : first + len(of_slices), dy : dy + h, dx : dx + w]
                total[dt, dy, dx] += (here * of_slices).sum((0, 1, 2))
    return total.flatten(0, 2).T


class Attention(nn.Module):
    """Cosine attention: q and k of unit length times learned scales, logits times 8, optional additive bias.

    The norm acts on the query's input only; keys and values come from the un-normalised input, as published.
    """

    SCALE = 8.0  # fixed, not K ** -0.5

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.norm = Norm(dim)
        self.to_q = Linear(dim, heads * dim_head, bias=False)
        self.to_kv = Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, N, n, K)
        k, v = self.to_kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x (b, N, n, K)
        q = F.normalize(q, dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        if bias is not None and bias.requires_grad and torch.is_grad_enabled() and is_plain_cpu(x):
            out = _BiasedAttention.apply(q, k, v, bias, self.SCALE)
        else:
            bias = None if bias is None else bias.to(v.dtype)
            out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=bias, scale=self.SCALE)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (b, n, C)


class _BiasedAttention(torch.autograd.Function):
    """Scaled dot-product attention with a bias that trains: torch's fused kernels give a mask no gradient, and without
    them all sequences' similarities would be kept at once."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.detach(), scale=scale)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One sequence after the other: similarities (N, n, n) stay in the cache."""
        q, k, v, bias, out = ctx.saved_tensors
        of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
        of_bias = torch.zeros_like(bias)
        inner = (grad * out).sum(-1, keepdim=True)  # (b, N, n, 1)
        for b in range(len(q)):
            shares = torch.baddbmm(bias[0], q[b], k[b].mT, alpha=ctx.scale).softmax(-1)
            torch.bmm(shares.mT, grad[b], out=of_v[b])
            change = torch.bmm(grad[b], v[b].mT).sub_(inner[b]).mul_(shares)  # of the logits
            of_bias[0] += change
            torch.bmm(change, k[b], out=of_q[b])
            torch.bmm(change.mT, q[b], out=of_k[b])
        return of_q.mul_(ctx.scale), of_k.mul_(ctx.scale), of_v, of_bias, None


class GEGLU(nn.Module):
    """(..., 2 F) -> (..., F): the first half times the exact GELU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        if is_plain_cpu(x):
            return _GatedUnits.apply(x) if torch.is_grad_enabled() else _gated(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


class _GatedUnits(torch.autograd.Function):
    """GEGLU that keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        of_x = torch.empty_like(x)
        of_value, of_gate = of_x.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=of_value)
        of_gate.copy_(torch.ops.aten.gelu_backward(grad * value, gate))
        return of_x


def _kept(module: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """The module's output; what its backward pass needs is kept."""
    return module(x, *rest)


def _recomputed(module: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """The module's output; of what its backward pass needs only the input is kept. It must draw no random numbers."""
    output: Tensor = checkpoint(module, x, *rest, use_reentrant=False, preserve_rng_state=False)
    return output


class TransformerLayer(nn.ModuleList):
    """Position encoding, attention and feed-forward, each with a residual connection.

    The checkpoint numbers an unused cross attention (2) and, in the feed-forward, a dropout (3): hence the identities.
    """

    # Tokens of one chunk on a CPU: its activations, 25 MB in the feed-forward, stay near the cache, and the chunks are
    # few enough that threads seldom wait for each other.
    TOKENS_AT_ONCE = 2304

    def __init__(self, sizes: TowerSizes):
        dim, inner = sizes.dim, sizes.feedforward
        widen, narrow = Linear(dim, 2 * inner, bias=False), Linear(inner, dim, bias=False)
        feedforward = nn.Sequential(nn.LayerNorm(dim), widen, GEGLU(), nn.Identity(), narrow)
        super().__init__([PEG(dim), Attention(dim, sizes.heads, sizes.dim_head), nn.Identity(), feedforward])

    def forward(
        self,
        x: Tensor,
        grid_shape: tuple[int, int, int, int],
        bias: Tensor | None,
        run: Callable[..., Tensor] = _kept,
    ) -> Tensor:
        """(sequences, tokens, C) -> the same shape. `run`: `_kept` or `_recomputed`, for each chunk."""
        peg, attention, _, feedforward = self
        filtered = peg(x, grid_shape)
        at_once = max(1, self.TOKENS_AT_ONCE // x.shape[1])
        if is_plain_cpu_inference(x):
            x = filtered.add_(x)
            for chunk in x.split(at_once):  # from here on sequences are independent
                chunk += attention(chunk, bias)
                chunk += feedforward(chunk)
            return x
        x = filtered + x
        if not is_plain_cpu(x):
            return run(self._mixed, x, bias)
        return torch.cat([run(self._mixed, chunk, bias) for chunk in x.split(at_once)])

    def _mixed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        _, attention, _, feedforward = self
        x = attention(x, bias) + x
        return feedforward(x) + x


class Transformer(nn.Module):
    def __init__(self, sizes: TowerSizes, depth: int):
        super().__init__()
        self.layers = nn.ModuleList([TransformerLayer(sizes) for _ in range(depth)])
        self.norm_out = Norm(sizes.dim)

    def forward(
        self,
        x: Tensor,
        grid_shape: tuple[int, int, int, int],
        bias: Tensor | None = None,
        run: Callable[..., Tensor] = _kept,
    ) -> Tensor:
        for layer in self.layers:
            x = layer(x, grid_shape, bias, run)
        return self.norm_out(x)


class SpatialBias(nn.Module):
    """Additive attention bias (1, N, h*w, h*w) from the signed log offset between two in-plane tokens.

    Only (2h-1) * (2w-1) offsets are distinct: the network runs on those and the pairs gather from the result.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        hidden = [nn.Sequential(nn.Linear(inputs, dim), nn.LeakyReLU(0.1)) for inputs in (2, dim)]
        self.net = nn.ModuleList([*hidden, nn.Linear(dim, heads)])

    def forward(self, h: int, w: int) -> Tensor:
        like = next(self.parameters())
        rows, columns = (torch.arange(n, device=like.device) for n in (h, w))
        dy, dx = (torch.arange(1 - n, n, device=like.device) for n in (h, w))
        offsets = torch.cartesian_prod(dy, dx).to(like.dtype)  # ((2h-1)(2w-1), 2)
        x = offsets.sign() * torch.log(offsets.abs() + 1)
        for layer in self.net:
            x = layer(x)
        row_index = rows[:, None] - rows[None, :] + h - 1  # (h, h)
        column_index = columns[:, None] - columns[None, :] + w - 1  # (w, w)
        pairs = row_index[:, None, :, None] * (2 * w - 1) + column_index[None, :, None, :]  # (h, w, h, w)
        # 4-D and contiguous: the fused attention kernels want it so, and would copy it each time.
        return x[pairs.reshape(h * w, h * w)].permute(2, 0, 1)[None].contiguous()


class Codebook(nn.Module):
    """A buffer, so that neither an optimiser nor `requires_grad_` changes it: it stays fixed when the tower trains."""

    embed: Tensor

    def __init__(self, codes: int, dim: int):
        super().__init__()
        embed = torch.empty(1, codes, dim)
        # On the meta device there is nothing to draw, and torch would import packages for half a second to do it.
        self.register_buffer("embed", embed if embed.is_meta else embed.normal_())


class Quantizer(nn.Module):
    """Replaces each token by the codebook row of highest cosine similarity, as stored (not normalised)."""

    TOKENS_AT_ONCE = 576  # bounds the similarity matrix to 576 x codes, 19 MB at the published size

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self._codebook = Codebook(codes, dim)

    @torch.no_grad()
    def code_ids(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (...) int64. Compared in float32 whatever the surrounding precision: near ties flip below it."""
        with torch.autocast(tokens.device.type, enabled=False):
            codes = F.normalize(self._codebook.embed[0].float(), dim=-1)
            flat = F.normalize(tokens.reshape(-1, tokens.shape[-1]).float(), dim=-1)
            ids = [fast_linear(chunk, codes).argmax(-1) for chunk in flat.split(self.TOKENS_AT_ONCE)]
        return torch.cat(ids).view(tokens.shape[:-1])

    def lookup(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., C)"""
        return F.embedding(ids, self._codebook.embed[0])

    def forward(self, tokens: Tensor) -> Tensor:
        code = self.lookup(self.code_ids(tokens))
        if not tokens.requires_grad:
            return code
        return tokens + (code - tokens).detach()  # straight-through: the lookup has no gradient of its own


class Patchify(nn.Module):
    """(B, 1, D, H, W) -> (B, T, h, w, temporal_patch * patch * patch), voxels of a patch in the order depth, x, y."""

    def __init__(self, temporal_patch: int, patch: int):
        super().__init__()
        self.temporal_patch, self.patch = temporal_patch, patch

    def forward(self, volume: Tensor) -> Tensor:
        p = self.patch
        x = volume[:, 0].unflatten(1, (-1, self.temporal_patch)).unflatten(3, (-1, p)).unflatten(5, (-1, p))
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # from (B, T, pt, h, p1, w, p2)


class VisualTransformer(nn.Module):
    """Volume -> tokens. The caller applies the quantiser `vq`: some need the tokens before it, some its codes."""

    def __init__(self, sizes: TowerSizes):
        super().__init__()
        self.temporal_patch, voxels = sizes.temporal_patch, sizes.temporal_patch * sizes.patch**2
        self.to_patch_emb = nn.Sequential(
            Patchify(sizes.temporal_patch, sizes.patch),
            nn.LayerNorm(voxels),
            nn.Linear(voxels, sizes.dim),  # not `Linear`: oneDNN sums 4,000 products less exactly than MKL
            nn.LayerNorm(sizes.dim),
        )
        self.spatial_rel_pos_bias = SpatialBias(sizes.bias_dim, sizes.heads)
        self.enc_spatial_transformer = Transformer(sizes, sizes.spatial_depth)
        self.enc_temporal_transformer = Transformer(sizes, sizes.temporal_depth)
        self.vq = Quantizer(sizes.codes, sizes.dim)
        self.checkpointing = False  # recompute what the backward pass needs instead of keeping it

    def forward(self, volume: Tensor) -> Tensor:
        """(B, 1, D, H, W) in [-1, 1] -> tokens before quantisation (B, T, h, w, C)"""
        run = _recomputed if self.checkpointing and torch.is_grad_enabled() else _kept
        x = self._embed(volume, run)  # (B, T, h, w, C)
        grid_shape = B, T, h, w = x.shape[:4]
        bias = self.spatial_rel_pos_bias(h, w)
        x = self.enc_spatial_transformer(x.reshape(B * T, h * w, -1), grid_shape, bias, run)  # (B*T, h*w, C)
        x = x.view(B, T, h * w, -1).transpose(1, 2).contiguous().view(B * h * w, T, -1)
        x = self.enc_temporal_transformer(x, grid_shape, run=run)  # (B*h*w, T, C)
        return x.view(B, h, w, T, -1).movedim(3, 1).contiguous()  # (B, T, h, w, C)

    def _embed(self, volume: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """(B, 1, D, H, W) -> (B, T, h, w, C); on a CPU slab by slab, in inference without a copy of the volume."""
        if not is_plain_cpu(volume):
            return run(self.to_patch_emb, volume)
        slabs = volume.split(self.temporal_patch, dim=2)
        return torch.cat([run(self.to_patch_emb, slab) for slab in slabs], dim=1)

    def group_matcher(self) -> dict:
        """timm's patterns that group parameters into layers, from input to output: stem, spatial, temporal layers."""
        groups: dict[str, Any] = {"stem": r"^to_patch_emb|^spatial_rel_pos_bias"}
        for kind in ("spatial", "temporal"):
            name = f"enc_{kind}_transformer"
            groups[kind] = [(rf"^{name}\.layers\.(\d+)", None), (rf"^{name}\.norm_out", (99999,))]  # joins the last
        return groups


# -- Heads -------------------------------------------------------------------------------------------------------------


def zero_linear(inputs: int, outputs: int = N_LABELS) -> nn.Linear:
    """(..., inputs) -> logits (..., outputs), exactly 0 at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def unit_input_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer for inputs of length about 1, as latents are, with outputs of about 1."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MLPHead(nn.Linear):
    """ClassFine's linear head plus a residual branch with one hidden layer: (B, L) after ReLU and dropout -> (B, 18).

    The branch starts at 0, so that training starts from the linear head's logits where the file has that head. For
    findings that show in combinations of the latent's features, with enough volumes to learn these (600 phantoms gained
    nothing).
    """

    def __init__(self, inputs: int, hidden: int = 256, dropout: float = 0.3, outputs: int = N_LABELS):
        super().__init__(inputs, outputs)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.hidden = unit_input_linear(inputs, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = zero_linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        # Scaled to length about 1, like the latent, so that one learning rate suits both branches.
        hidden = F.gelu(self.hidden(x)) / math.sqrt(self.hidden.out_features)
        return super().forward(x) + self.out(self.dropout(hidden))


class AttentionHead(nn.Module):
    """One learned query per label pools a volume's tokens: codes (B, T, h, w) or tokens (B, T, h, w, C) -> (B, 18).

    A small network computes hidden features for each token alone, and from them, per label, a score (query . features)
    and evidence for the finding (output weight . features). With position terms for depth, row and column,

        attention = softmax over the T*h*w tokens of (score + position),   logit = bias + sum(attention * evidence).

    Tokens are rows of the codebook, so score and evidence are computed once per batch for the whole codebook, as a
    (codes, 2 * 18) table from which the volumes gather.

    For small findings, which the latent's mean over depth averages away. It starts untrained, also where the file has
    ClassFine's head, and learns where to look from labels of whole volumes: with a few hundred of them, compare it with
    "linear".
    """

    def __init__(
        self, dim: int, grid: tuple[int, int, int], hidden: int = 128, dropout: float = 0.3, outputs: int = N_LABELS
    ):
        super().__init__()
        depth, rows, columns = grid
        self.hidden = unit_input_linear(dim + 1, hidden)
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(hidden, outputs, bias=False)
        nn.init.zeros_(self.query.weight)  # at the start every token counts the same
        self.evidence = zero_linear(hidden, outputs)
        self.depth = nn.Parameter(torch.zeros(outputs, depth))
        self.row = nn.Parameter(torch.zeros(outputs, rows))
        self.column = nn.Parameter(torch.zeros(outputs, columns))

    def forward(self, x: Tensor, codebook: Tensor | None = None) -> Tensor:
        """Code ids (B, T, h, w), int32 or int64, with the codebook (codes, C); or tokens (B, T, h, w, C)."""
        attention, evidence = self.attend(x, codebook)
        return (attention * evidence).sum((2, 3, 4)) + self.evidence.bias

    def attend(self, x: Tensor, codebook: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`'s input -> attention and evidence, (B, 18, T, h, w) each; attention sums to 1 over T*h*w.

        In float32 whatever the surrounding precision: half precision has too few digits for 13,824 shares of 1.
        """
        with torch.autocast(x.device.type, enabled=False):
            if codebook is None or x.is_floating_point():
                table = self._table(x.float())
            else:
                table = F.embedding(x, self._table(codebook.float()))
            score, evidence = table.chunk(2, dim=-1)  # (B, T, h, w, 18) each
            score = score + self._position(*x.shape[1:4])
            attention = score.flatten(1, 3).softmax(1).view_as(score)  # labels stay last, as the gather lays them out
            return attention.movedim(-1, 1), evidence.movedim(-1, 1)

    def _table(self, tokens: Tensor) -> Tensor:
        """(..., C) -> scores and evidence, (..., 2 * 18), of each token alone.

        The quantiser compares directions only, so the length of a code may carry information of its own: its logarithm
        is an input beside the direction.
        """
        length = tokens.norm(dim=-1, keepdim=True).clamp(min=1e-6).log10()
        hidden = F.gelu(self.hidden(torch.cat([F.normalize(tokens, dim=-1), length], dim=-1)))
        hidden = hidden / math.sqrt(self.hidden.out_features)
        return F.linear(self.dropout(hidden), torch.cat([self.query.weight, self.evidence.weight]))

    def _position(self, T: int, h: int, w: int) -> Tensor:
        """(T, h, w, 18). Another number of tokens is taken as the same extent in other steps."""
        sides = ((self.depth, T), (self.row, h), (self.column, w))
        depth, row, column = (
            (side if side.shape[1] == n else F.interpolate(side[None], n, mode="linear")[0]).T for side, n in sides
        )  # (T, 18), (h, 18), (w, 18)
        return depth[:, None, None] + row[:, None] + column


class QueryHead(AttentionHead):
    """AttentionHead for a slice backbone's tokens (B, S, h, w, C), without a hidden layer between token and score:

        attention = softmax over the S*h*w tokens of (token . query / sqrt(C) + position),
        logit = bias + weight . sum(attention * token).

    At the start every token counts the same: what is trained first is the linear head on the tokens' mean.
    """

    def __init__(self, dim: int, grid: tuple[int, int, int], dropout: float = 0.3, outputs: int = N_LABELS):
        nn.Module.__init__(self)
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(dim, outputs, bias=False)
        nn.init.zeros_(self.query.weight)
        self.evidence = zero_linear(dim, outputs)
        self.depth, self.row, self.column = (nn.Parameter(torch.zeros(outputs, n), n > 1) for n in grid)

    def _table(self, tokens: Tensor) -> Tensor:
        """(B, S, h, w, C) -> scores and evidence, (B, S, h, w, 2 * 18). Dropout takes the same channels of all of a
        volume's tokens, as it takes those of their mean in the linear head."""
        kept = self.dropout(torch.ones_like(tokens[:, :1, :1, :1]))
        score = F.linear(tokens, self.query.weight) / math.sqrt(tokens.shape[-1])
        return torch.cat([score, F.linear(tokens * kept, self.evidence.weight)], dim=-1)


class MaxHead(AttentionHead):
    """The highest tokens of a slice backbone speak for a volume: tokens (B, S, h, w, C) -> (B, 18).

        logit = bias + mean of the `tokens` highest values of (weight . token)

    For findings that fill a few tokens. From one random start gradients do not find these; ctclip.training.max_head
    fits the weights to the training volumes first.
    """

    def __init__(self, dim: int, outputs: int = N_LABELS, tokens: int = 5):
        nn.Module.__init__(self)
        self.evidence = zero_linear(dim, outputs)
        self.tokens = tokens

    def attend(self, x: Tensor, codebook: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`'s input -> attention, which is an equal share for each of the highest tokens and 0 for the others,
        and evidence, (B, 18, S, h, w) each. In float32 whatever the surrounding precision. A slice backbone has no
        `codebook`."""
        with torch.autocast(x.device.type, enabled=False):
            evidence = F.linear(x.float(), self.evidence.weight).movedim(-1, 1)
            flat = evidence.detach().flatten(2)
            count = min(self.tokens, flat.shape[-1])
            highest = flat.topk(count, dim=-1).indices
            attention = torch.zeros_like(flat).scatter(-1, highest, 1 / count)
            return attention.view_as(evidence), evidence


HEADS = ("linear", "mlp", "attention", "prompts")  # of CT-CLIP
SLICE_HEADS = ("linear", "attention", "max")  # of slice backbones
SLICE_TOKENS = ("slice", "patch")
PLACES = 8  # in plane, along each axis, at which a head on patches knows where it is: 45 mm


def create_head(name: str, sizes: TowerSizes, dropout: float, outputs: int = N_LABELS) -> nn.Module:
    """The head of a CT-CLIP variant; its logits are exactly 0 until it is trained or loaded."""
    if name == "mlp":
        return MLPHead(sizes.latent, dropout=dropout, outputs=outputs)
    if name == "attention":
        return AttentionHead(sizes.dim, (sizes.grid,) * 3, dropout=dropout, outputs=outputs)
    return zero_linear(sizes.latent, outputs)


# -- Checkpoints -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """Counts of a weights file's tensors by what was done with them, each counted once, and the head's origin."""

    path: str
    loaded: int
    dropped: dict[str, int]  # reason -> number of tensors
    new: tuple[str, ...]  # tensors of the model that are neither in the file nor computed by its text tower
    head: str
    no_prompts_reason: str | None = None  # why the text tower could not make the head, where it should have
    assumed: str = ""  # what else is to be said: of sizes that the file does not tell, of a new stem

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "none"
        new = ", ".join(self.new) or "none"
        text = f"{self.path}: {self.loaded} tensors loaded; dropped by name: {dropped}; not in the file: {new}"
        reason = f" (no prompts: {self.no_prompts_reason})" if self.no_prompts_reason else ""
        return f"{text}; head: {self.head}{reason}{self.assumed}"

    def __repr__(self) -> str:
        """In a line, as it is printed before a training; `str` has the reasons."""
        dropped = sum(self.dropped.values())
        return f"{self.path}: {self.loaded} tensors loaded, {dropped} dropped by name; head: {self.head}{self.assumed}"

    def _repr_html_(self) -> str:
        return f"<details><summary>{html.escape(repr(self))}</summary>{html.escape(str(self))}</details>"


def written_files(folder: Path) -> dict[str, str]:
    """{name: SHA-256 of what was written} of the files that a folder's WRITTEN lists, {} without one.

    "" for a file that was begun and never finished. Each line adds to those before it, null for a file that was removed
    again; a line that a kill has torn counts for nothing.
    """
    try:
        lines = (folder / WRITTEN).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    listed: dict[str, str | None] = {}
    for line in lines:
        try:
            entries = json.loads(line)
        except (ValueError, RecursionError):
            continue
        listed |= entries if isinstance(entries, dict) else {}
    plain = [name for name in listed if PureWindowsPath(name).name == name not in ("", "..")]  # none out of the folder
    return {name: digest for name in plain if isinstance(digest := listed[name], str)}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_written(folder: Path, entries: dict[str, str | None]) -> None:
    """Adds a line to the folder's WRITTEN; it is on the disk when this returns."""
    with open(folder / WRITTEN, "ab", buffering=0) as file:
        file.write(f"\n{json.dumps(entries)}\n".encode())  # the first break ends a torn line
        os.fsync(file.fileno())


@contextmanager
def listing(folder: Path, *names: str) -> Iterator[None]:
    """Around writing, replacing or removing these files of a folder: it lists them before, and with digests after."""
    list_written(folder, dict.fromkeys(names, ""))
    yield
    paths = {name: folder / name for name in names}
    list_written(folder, {name: sha256_of(path) if path.is_file() else None for name, path in paths.items()})


def check_written(path: Path) -> None:
    """Raises CheckpointError where a file is not what was written under its name; one that is not listed passes."""
    expected = written_files(path.parent).get(path.name)
    if expected and path.is_file() and (found := sha256_of(path)) != expected:
        raise CheckpointError(
            f"{path}: found other content than was written (SHA-256 {found[:12]}..., expected {expected[:12]}...); "
            f"copy it again, or have it made again; if the change is yours, delete {path.with_name(WRITTEN)}"
        )


def saved_config(folder: Path) -> dict:
    """config.json of a saved model. Raises CheckpointError where it is absent, damaged or another program's."""
    path, remedy = folder / "config.json", "copy it again from where the model was saved"
    check_written(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        found = f"{path}: found no such file, expected the one that is saved with the weights"
        raise CheckpointError(f"{found}; {remedy}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: found no JSON ({error}), expected a saved model's sizes; {remedy}") from error
    if not isinstance(config, dict) or config.get("ctclip_path", "") is not None:
        raise CheckpointError(f"{path}: found other content than a saved model's, expected its sizes; {remedy}")
    labels = config.get("labels")
    if labels is not None and not (isinstance(labels, list) and labels and all(isinstance(n, str) for n in labels)
                                   and len(set(labels)) == len(labels)):  # fmt: skip
        raise CheckpointError(f"{path}: found other labels than a list of different names, expected those that the "
                              f"model was saved with; {remedy}")  # fmt: skip
    return config


def is_demo(path: str | os.PathLike) -> bool:
    """Whether a file is the demo's, whatever its name: its tower was trained on phantoms."""
    demo, path = Path(DEMO_PATH), Path(path)
    return demo.is_file() and path.stat().st_size == demo.stat().st_size and sha256_of(path) == sha256_of(demo)


def published_name(path: str | os.PathLike) -> str:
    """Name of a weights file without folder and ending if it is a published one, else "other"."""
    stem = PureWindowsPath(path).stem  # takes both kinds of separator
    return stem if stem in PUBLISHED_FILES else "other"


def existing_weights(path: str | os.PathLike) -> Path:
    """`path`, or the slim copy (`ctclip_setup.py --slim`) where only that is there."""
    path = Path(path)
    slim = path.with_suffix(".safetensors")
    return slim if not path.exists() and slim.is_file() and is_slim_copy(slim, path) else path


def is_slim_copy(slim: Path, path: Path) -> bool:
    """Whether a .safetensors file was made from `path`; also True for a damaged one, so that loading reports that."""
    try:
        with safe_open(slim, framework="pt") as file:
            return (file.metadata() or {}).get(SLIM_OF) == path.name
    except SafetensorError:
        return True


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a .pt or .safetensors file, memory-mapped, under the published keys: what wrappers and training code
    put before them is removed.

    Only tensors are read (`weights_only=True`): a pickle that could run code is refused. Raises FileNotFoundError when
    there is no such file and CheckpointError when it does not hold one dictionary of tensors.
    """
    path = Path(path)
    if path.is_dir():
        check_no_other_folder(path)
        raise CheckpointError(f"{path}: found a folder, expected a weights file; a saved model is loaded by "
                              "CTCLIPMultiAbnormalityModel.from_pretrained(FOLDER)")  # fmt: skip
    if path.exists() and not path.is_file():
        found = f"{path}: found a pipe or a device"
        raise CheckpointError(f"{found}, expected a weights file; write it into a file first")
    if not path.is_file():
        raise FileNotFoundError(f"CT-CLIP model not found: run python ctclip_setup.py first (no file at {path})")
    state = read_tensors(path)
    names = {key: [part for part in key.split(".") if part not in WRAPPERS] for key in state}
    before = {tuple(parts[: parts.index(TOWER)]) for parts in names.values() if TOWER in parts}
    if len(before) > 1:
        shown = " and ".join(repr(".".join(prefix)) for prefix in sorted(before)[:3])
        raise CheckpointError(f"{path} holds the tower under {shown}, expected it once; save the one that you mean "
                              "alone")  # fmt: skip
    prefix = list(next(iter(before), ()))
    stripped: dict[str, Tensor] = {}
    for key, parts in names.items():
        name = ".".join(parts[len(prefix) :] if parts[: len(prefix)] == prefix else parts)
        if name in stripped:
            raise CheckpointError(f"{path} holds '{name}' twice, under different prefixes; expected each tensor once")
        stripped[name] = state[key]
    return stripped


def check_no_other_folder(folder: Path) -> None:
    """Raises CheckpointError where a folder is what a weights file was unpacked into, or holds weights in shards."""
    if any((*folder.glob("data.pkl"), *folder.glob("*/data.pkl"))):
        raise CheckpointError(f"{folder}: found a folder, which is an unpacked .pt file, expected the file itself; "
                              "download it again, without unpacking it")  # fmt: skip
    if shards := sorted(path.name for path in folder.iterdir() if SHARD.search(path.name)):
        found = f"{folder}: found weights in shards ({_first_five(shards)})"
        raise CheckpointError(f"{found}, expected one file; {ONE_FILE}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The one dictionary of tensors that a file holds, memory-mapped, under its own keys; an epoch or the like among
    them is left out. Raises CheckpointError."""
    content = _state_dict(_read_file(path), path)
    state = {key: value for key, value in content.items() if not _is_setting(key, value)}
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: found {ascii(key)[:40]} as the name of a tensor, expected text; save a "
                                  "model's state_dict()")  # fmt: skip
        if kind := _unusual_kind(value):
            raise CheckpointError(f"{path}: found {key[:100]!r}, which is {kind}, expected dense tensors of numbers "
                                  "only; save a plain state_dict()")  # fmt: skip
    return state


def _is_setting(key: Any, value: Any) -> bool:
    """Whether this is an epoch or the like, which training code puts among the tensors: no parameter is called so."""
    return isinstance(key, str) and isinstance(value, SCALARS) and "." not in key and unused_reason(key) is None


def settings_among_tensors(path: Path) -> list[str]:
    """What `read_tensors` leaves out of a file."""
    if _file_kind(path) == "safetensors":
        return []
    return [key for key, value in _state_dict(_unpickled(path), path).items() if _is_setting(key, value)]


def _unusual_kind(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return "a NumPy array or another object, no tensor" if isinstance(value, _Inert) else "no tensor"
    if value.is_meta:
        return "a tensor without its numbers (meta)"
    if value.is_quantized:
        return "quantised"
    return None if value.layout == torch.strided and not value.is_nested else "sparse or nested"


def _state_dict(content: Any, path: Path) -> dict[Any, Any]:
    """The dictionary of tensors in what a file holds; in a training state, which has others, that with the tower."""
    inside = dict(_dicts_in(content))
    found = {place: state for place, state in inside.items() if any(isinstance(v, Tensor) for v in state.values())}
    towers = {place: state for place, state in found.items() if any(f".{TOWER}." in f".{key}" for key in state)}
    if len(towers) > 1:
        raise CheckpointError(f"{path} holds {len(towers)} sets of weights, under {' and '.join(towers)}, expected "
                              "one; save the one that you mean alone")  # fmt: skip
    for state in towers.values():
        return state
    if isinstance(content, dict) and {"state", "param_groups"} <= content.keys():
        raise CheckpointError(
            f"{path} holds an optimizer's state, which some training code saves over the weights, expected weights; "
            "they are not in it: use a file of another epoch, or fetch it again (python ctclip_setup.py)"
        )
    if not found and any(isinstance(value, _Inert) for state in inside.values() for value in state.values()):
        raise CheckpointError(f"{path} holds NumPy arrays or other objects, expected tensors; {AS_TENSORS}")
    if "" not in found and len(found) != 1:
        keys = _first_five([str(key)[:40] for key in content]) if isinstance(content, dict) else ""
        raise CheckpointError(f"{path} holds a {type(content).__name__} ({keys}), expected a non-empty dictionary of "
                              "tensors; save a model's state_dict()")  # fmt: skip
    return found.get("") or next(iter(found.values()))


def _dicts_in(content: Any, place: str = "", deep: int = MOST_NESTED) -> Iterator[tuple[str, dict]]:
    """(where it is, dictionary), nested ones too."""
    if isinstance(content, dict):
        yield place, content
        for key, value in content.items() if deep else ():
            yield from _dicts_in(value, f"{place}[{str(key)[:40]!r}]", deep - 1)


def _read_file(path: Path) -> Any:
    """What the file holds; every way in which it cannot be read is a CheckpointError."""
    check_written(path)
    try:
        return _mapped(path) if _file_kind(path) == "safetensors" else _unpickled(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        named = ", ".join(sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))[:3])
        raise CheckpointError(
            f"{path} holds more than tensors{named and f' ({named})'} and was refused (loading it could run code). "
            "Expected a plain state dict: save model.state_dict() alone; or run python ctclip_setup.py for the "
            "published weights"
        ) from error
    except Exception as error:  # whatever damaged bytes lead torch's and zipfile's parsers to
        raise _unreadable(path, _first_sentence(error)[:200]) from error


def _unreadable(path: Path, reason: str) -> CheckpointError:
    if path.name == SAVED_WEIGHTS:
        return CheckpointError(f"{path}: found a damaged file ({reason}), expected a saved model's weights; copy it "
                               "again, or resume the run")  # fmt: skip
    return CheckpointError(f"{path} is not a readable weights file ({reason}), expected .pt or .safetensors; if a "
                           "download was cut off, delete it and run python ctclip_setup.py again")  # fmt: skip


def _file_kind(path: Path) -> str:
    """What the file is by its content, whatever it is called: "safetensors", or "torch" for torch.save's formats.

    Raises CheckpointError for any other, and says which.
    """
    if SHARD.search(path.name):
        raise CheckpointError(f"{path}: found one of several shards of weights, expected one file; {ONE_FILE}")
    with open(path, "rb") as file:
        start = file.read(512)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000:  # safetensors' own limit
        return "safetensors"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    what, remedy = next((row[1:] for row in OTHER_FILES if text.startswith(row[0])), ("", ""))
    if text.startswith(b"{") and b'"weight_map"' in text:
        what, remedy = "JSON text that lists the shards of weights", ONE_FILE
    elif path.name == "data.pkl" and not zipfile.is_zipfile(path):
        what, remedy = "a part of an unpacked .pt file", "download that again, without unpacking it"
    elif start.startswith(b"\x80") and b"numpy" in start:
        what, remedy = "pickled NumPy arrays", AS_TENSORS
    elif start[257:262] == b"ustar":
        what, remedy = "a tar archive", "unpack it"
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        last = {name.rpartition("/")[2] for name in names}
        if last and all(name.endswith(".npy") for name in last):
            what, remedy = "NumPy arrays (.npz)", AS_TENSORS
        elif "data.pkl" not in last:
            what, remedy = f"a zip archive that holds {_first_five(names)[:200] or 'nothing'}", "unpack it"
        elif "constants.pkl" in last:
            what, remedy = "a TorchScript model", "save its state_dict() by torch.save"
    if what:
        raise CheckpointError(f"{path}: found {what}, expected weights (.pt or .safetensors); {remedy}")
    if not start.startswith((b"\x80", b"PK")):  # a pickle, or a zip whose end is lost
        raise _unreadable(path, f"it begins with {start[:16]!r}" if start else "it is empty")
    return "torch"


class _Inert:
    """In the place of an object of INERT_PACKAGES, which is not made: it takes what the file gives it and does
    nothing."""

    def __init__(self, *args: Any, **options: Any): ...

    def __setstate__(self, state: Any) -> None: ...


def _unpickled(path: Path) -> Any:
    """Tensors and plain containers of a file that torch.save wrote. Raises UnpicklingError for any other object but
    those of INERT_PACKAGES, which become _Inert."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": _can_be_mapped(path)}
    # torch also goes by a path's suffix; and warns of sparse tensors, which are refused.
    with nullcontext(path) if options["mmap"] else open(path, "rb") as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(source, **options)
        except pickle.UnpicklingError:
            if not zipfile.is_zipfile(path):
                raise
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not others or any(not {name, name.partition(".")[0]} & set(INERT_PACKAGES) for name in others):
                raise
        if not isinstance(source, Path):
            source.seek(0)
        with torch.serialization.safe_globals([(_Inert, name) for name in others]):
            return torch.load(source, **options)


def _mapped(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, memory-mapped."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)


def _can_be_mapped(path: Path) -> bool:
    """False for torch's old, non-zip format, and for its file under the other's name: these are read whole."""
    return _file_kind(path) == "safetensors" or (zipfile.is_zipfile(path) and path.suffix != ".safetensors")


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Raises CheckpointError that names a tensor with NaN, infinity or numbers that overflow in use, and an empty
    codebook: the quantiser would hide them behind the same answers for every scan."""
    again = "fetch or copy the file again, or use the weights of another epoch"
    for key, value in tensors.items():
        # A sum shows it without the memory of a mask; then the tensor is looked at.
        if value.is_floating_point() and not abs(float(value.sum())) < HUGE_WEIGHT:
            if not value.isfinite().all():
                raise CheckpointError(f"{path}: found NaN or infinity in {key}, expected numbers; {again}")
            if (highest := float(value.abs().max())) >= HUGE_WEIGHT:
                expected = f"weights below {HUGE_WEIGHT:g}"
                raise CheckpointError(f"{path}: found numbers up to {highest:g} in {key}, expected {expected}; {again}")
        if key.endswith("_codebook.embed") and value.min() == value.max():
            raise CheckpointError(f"{path}: found one number in all of {key}, expected a codebook; {again}")


@torch.no_grad()
def _in_memory(
    read: Callable[[], dict[str, Tensor]], like: dict[str, Tensor], path: str | os.PathLike
) -> dict[str, Tensor]:
    """Copies of a mapped file's tensors on the CPU, checked to be finite, with the names and types of `like`; `read`
    maps the file at `path`.

    Pages of a mapping count as memory from their first use until it ends, so it is ended every READ_AT_ONCE numbers.
    The model does not keep the mapping: a file that is cut short under one kills the process.
    """
    state, count, copies = read(), 0, {}
    for key, tensor in like.items():
        copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for start in range(0, tensor.numel(), READ_AT_ONCE):
            if count >= READ_AT_ONCE:
                state, count = read(), 0
            target = copies[key].view(-1)[start : start + READ_AT_ONCE]
            source = state[key].reshape(-1)[start : start + READ_AT_ONCE]
            for part, values in zip(target.split(ONE_THREAD), source.split(ONE_THREAD), strict=True):
                part.copy_(values)
                check_finite({key: part}, path)  # while it is in the cache
            count += len(target)
    return copies


def _beside_weights(path: Path) -> dict[Any, Any]:
    """What a file holds, and for a .safetensors file what its header says, with config.json of the same folder where
    it is a saved model's."""
    if _file_kind(path) != "safetensors":
        content = _unpickled(path)
        return content if isinstance(content, dict) else {}
    with safe_open(path, framework="pt") as file:
        texts = dict(file.metadata() or {})
    if path.name == SAVED_WEIGHTS:
        with suppress(OSError, UnicodeDecodeError):
            texts["config.json"] = path.with_name("config.json").read_text(encoding="utf-8-sig")
    return {key: _parsed(text) for key, text in texts.items()}


def _parsed(text: str) -> Any:
    """What JSON text says; of other text the list of its parts between commas."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.split(",")


def _listed_names(value: Any) -> list[str]:
    """The names in a list, in {0: name} or in {name: 0}, in a list of {"name": ...}, also as an array or as text (JSON,
    or separated by commas); [] of anything else."""
    if not isinstance(value, (str, bytes, dict, list, tuple, Tensor)) and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, (list, tuple)):
        value = [next((part[key] for key in ("name", "label") if key in part), None) if isinstance(part, dict) else part
                 for part in value]  # fmt: skip
    if isinstance(value, dict) and all(isinstance(number, int) for number in value.values()):
        value = sorted(value, key=value.__getitem__)
    elif isinstance(value, dict) and all(str(number).isdecimal() for number in value):
        value = [value[number] for number in sorted(value, key=int)]
    return list(value) if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value) else []


def check_label_order(path: Path) -> None:
    """Raises CheckpointError where a file names the rows of its head, and they are not ABNORMALITIES in their order."""
    ours = [_plain(name) for name in ABNORMALITIES]
    for place, part in _dicts_in(_beside_weights(path)):
        for key, value in part.items():
            names = [_plain(name) for name in _listed_names(value)]
            same = sorted(names) == sorted(ours)
            if names == ours or not (same or (str(key).lower() in LABEL_KEYS and len(names) == N_LABELS)):
                continue
            at = next(i for i in range(N_LABELS) if names[i] != ours[i])
            what = "the 18 findings in another order" if same else "other findings"
            way = "save it with its rows in that order, or " if same else ""
            raise CheckpointError(
                f"{path}: found {what} under {place}[{str(key)[:40]!r}] ({names[at][:60]!r} in row {at + 1} of the "
                f"head, expected {ABNORMALITIES[at]!r}); {way}leave its head aside: "
                f"in training {NEW_HEAD_FLAG}, in Python new_head=True"
            )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def unused_reason(key: str) -> str | None:
    """Why an image classifier does not use this key of a file; None where no reason is known."""
    if key.endswith("._codebook.embed"):
        return None
    return next((reason for part, reason in UNUSED_KEYS if key.startswith(part) or part in f".{key}"), None)


def own_head(state: dict[str, Tensor]) -> str | None:
    """The head that a state dict of this module's model has, where it is another than ClassFine's linear one."""
    if "classifier.query.weight" in state:
        return "attention"
    if "classifier.hidden.weight" in state:
        return "mlp"
    weight, bias = (state.get(key) for key in LINEAR_HEAD_KEYS)
    if weight is None or bias is None or FIRST_FRAME in state:
        return None
    return "prompts" if weight.any() and not bias.any() else None  # training moves every bias off 0


def _misfit(value: Tensor, own: Tensor) -> str | None:
    """Why a file's tensor cannot stand in the place of the model's `own`."""
    if value.shape != own.shape:
        return f"is {tuple(value.shape)}, expected {tuple(own.shape)}"
    if value.dtype != own.dtype and not {value.dtype, own.dtype} <= set(FLOATS):
        return f"is {value.dtype}, expected {own.dtype}".replace("torch.", "")
    if value.untyped_storage().nbytes() < value.nbytes:
        return "has more numbers than the file holds"
    return None


def load_tower(
    model: CTCLIPMultiAbnormalityModel, state: dict[str, Tensor], path: Path, made: dict[str, Tensor],
    no_prompts_reason: str | None, new_head: bool = False,
) -> LoadReport:  # fmt: skip
    """Gives `model` the tensors of the file at `path`; every key of either is loaded, dropped by name, or an error.

    `state`: what `read_checkpoint(path)` gave; `made`: the head that the text tower made, if it did. The head
    (`classifier.*`) is the one part that a file may lack: it then keeps its start values and is reported. ClassFine's
    linear head is dropped where the model has another one; with `new_head`, whatever head the file has.
    """
    own, head = model.state_dict(), "classifier."
    used = [key for key in state if key in own and key not in made and not (new_head and key.startswith(head))]
    reasons = {
        key: "the file's head" if new_head and key.startswith(head)
        else "ClassFine's linear head" if key in LINEAR_HEAD_KEYS else unused_reason(key)
        for key in state.keys() - set(used)
    }  # fmt: skip
    absent = [key for key in own if key not in used and key not in made]
    new = tuple(key for key in absent if key.startswith("classifier."))
    half = [f"{key} is missing" for key in LINEAR_HEAD_KEYS if key in new]
    problems = {
        "missing": [key for key in absent if key not in new],
        "unexpected": [key for key in state if key in reasons and reasons[key] is None],
        "wrong shape or type": [
            f"{key} {misfit}"
            for key, value in ({key: state[key] for key in used} | made).items()
            if (misfit := _misfit(value, own[key]))
        ],
        "half a head": half if len(half) == 1 else [],
    }
    listed = [f"{problem}: {_first_five(keys)}" for problem, keys in problems.items() if keys]
    if listed:
        way = "Nothing was loaded"
        if all(key.startswith(head) for keys in problems.values() for key in keys):
            way = f"The tower loads with a new head: in training {NEW_HEAD_FLAG}, in Python new_head=True"
        found = f"{path} does not fit a CT-CLIP image tower ({'; '.join(listed)}), expected all of one and no more"
        raise CheckpointError(f"{found}. {way}")
    read = partial(read_checkpoint, path) if _can_be_mapped(path) else lambda: state
    check_finite(made, f"{path}, made into prompts")
    copies = _in_memory(read, {key: own[key] for key in used}, path)
    model.load_state_dict({key: own[key] for key in new} | made | copies, assign=True)
    dropped = Counter(str(reasons[key]) for key in state if key in reasons)
    if made and "text tower" in dropped:
        dropped["text tower, once made into the head"] = dropped.pop("text tower")
    if made:
        origin = f"for {len(made[LINEAR_HEAD_KEYS[0]])} findings, made from the file's text tower"
    else:
        linear = model.head_name == "mlp" and LINEAR_HEAD_KEYS[0] not in new
        origin = "from the file" if not new else "its linear part from the file" if linear else "new"
    return LoadReport(str(path), len(used), dropped, new, f"{model.head_name}, {origin}", no_prompts_reason)


def _first_five(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(key[:120] if key and key.isprintable() else ascii(key)[:120] for key in keys[:5]) + more


# -- Text tower: findings in words -> a linear head --------------------------------------------------------------------
#
# Legend   n findings, S tokens of the longest prompt, L latent.
#
# Shapes   finding -> "{finding} is present." and "{finding} is not present." -> tokens (2n, S) -> the checkpoint's
#          BERT, last hidden state at [CLS] -> `to_text_latent` (no bias), L2-normalised -> text latents (2n, L) ->
#          weight (n, L) = exp(temperature) * (present - absent).
#
# p(present) is published as the softmax over a pair of similarities exp(temperature) * (image latent . text latent).
# That is the sigmoid of (weight . image latent): no text is encoded at prediction time, and the latent has no ReLU.
#
# This needs the package transformers (its BertModel, and tokenizers, which comes with it) and the vocabulary of the
# text tower, one file of a public model repository.

VOCABULARY_REPOSITORY = "microsoft/BiomedVLP-CXR-BERT-specialized"
VOCABULARY_FILE = "vocab.txt"
TEXT_TOWER = "text_transformer."
TEXT_TOWER_UNUSED = ("embeddings.position_ids", "pooler.")  # 0, 1, 2, ...; not called by the published code
ATTENTION_HEADS = {768: 12, 24: 2}  # by width, because no shape tells: BERT's base size, and the tests'
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PROMPTS_AT_ONCE = 12  # 36 of them take a second, and their activations next to no memory


def vocabulary_path(weights: Path) -> Path:
    """Where the vocabulary of a weights file's text tower is looked for: in a folder beside it."""
    return weights.parent / VOCABULARY_REPOSITORY.rpartition("/")[2] / VOCABULARY_FILE


@dataclass(frozen=True)
class Prompts:
    """n findings and, for each, a text that says that it is present and one that says that it is absent.

    Raises PromptError where there is no finding, where a name or text is empty or a finding occurs twice, case apart.
    """

    names: tuple[str, ...]
    present: tuple[str, ...]
    absent: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or not len(self.names) == len(self.present) == len(self.absent):
            counts = f"{len(self.names)} findings, {len(self.present)} texts for and {len(self.absent)} against"
            raise PromptError(f"found {counts}, expected at least one finding and two texts for each; complete them")
        if not all(text.strip() for text in self.names + self.present + self.absent):
            raise PromptError("found a finding or a text that is empty, expected words; complete it")
        name, times = Counter(" ".join(name.lower().split()) for name in self.names).most_common(1)[0]
        if times > 1:
            raise PromptError(f"found '{name}' twice, expected every finding once (case is not read); remove one")

    @classmethod
    def from_names(cls, names: Sequence[str]) -> Prompts:
        """The published wording for these findings."""
        present, absent = ([f"{name} is {verb}." for name in names] for verb in ("present", "not present"))
        return cls(tuple(names), tuple(present), tuple(absent))

    def pairs(self) -> list[str]:
        """(2n) texts, present and absent in turn."""
        return [text for pair in zip(self.present, self.absent, strict=True) for text in pair]


def read_vocabulary(path: Path) -> list[str]:
    """The word pieces of a text tower, in the order of its embedding's rows, from vocab.txt: one per line.

    Raises PromptError where it is absent, no text or not BERT's.
    """
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError as error:
        raise PromptError(
            f"no vocabulary found at {path}, expected vocab.txt of {VOCABULARY_REPOSITORY}; to fetch it into "
            "models/: python ctclip_setup.py --model zeroshot (or vocabfine)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: found no text ({error}), expected a vocabulary; fetch it again") from error
    if missing := [piece for piece in SPECIAL if piece not in pieces]:
        found = f"{path}: found a vocabulary without {', '.join(missing)}"
        raise PromptError(f"{found}, expected BERT's; fetch {VOCABULARY_REPOSITORY}'s vocab.txt again")
    return pieces


def tokenise(prompts: Prompts, pieces: Sequence[str], positions: int) -> tuple[Tensor, Tensor]:
    """-> ids and mask (2n, S) int64, rows present and absent in turn: BERT's [CLS], lower-cased word pieces, [SEP].

    No word is cut off or skipped: raises PromptError for a text of more than `positions` tokens, and for one with
    words that the vocabulary does not cover. Case, accents and control characters are ignored.
    """
    with _transformers_needed():
        from tokenizers import BertWordPieceTokenizer
    table = {piece: row for row, piece in enumerate(pieces)}
    tokenizer = BertWordPieceTokenizer(table, lowercase=True)
    tokenizer.enable_padding(pad_id=table["[PAD]"])
    encoded = tokenizer.encode_batch(prompts.pairs())
    for row, text in enumerate(encoded):
        subject, length = f"a text of '{prompts.names[row // 2]}'", sum(text.attention_mask)
        if length > positions:
            found = f"{subject} has {length} tokens, expected at most {positions}"
            raise PromptError(f"{found}, the text tower's limit; shorten it")
        if "[UNK]" in text.tokens:
            found = f"{subject} has words that the text tower's vocabulary cannot spell"
            raise PromptError(f"{found}, expected English; word it otherwise")
    return torch.tensor([text.ids for text in encoded]), torch.tensor([text.attention_mask for text in encoded])


@contextmanager
def _transformers_needed() -> Iterator[None]:
    """Around an import of transformers or tokenizers: absent, or too old for this torch, is one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise PromptError(
            f"the package transformers cannot be imported ({_first_sentence(error)}), expected it, because it "
            "encodes the prompts; pip install transformers"
        ) from error


@contextmanager
def _errors_only(logging: Any) -> Iterator[None]:
    """Inside the block, a package's `logging` (transformers', huggingface_hub's) reports errors only."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def text_tower_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's text tower that it computes with, under BertModel's names.

    `state`: prefixes removed, as `read_checkpoint` gives it. Raises PromptError where there are none.
    """
    tensors = {
        key.removeprefix(TEXT_TOWER): value
        for key, value in state.items()
        if key.startswith(TEXT_TOWER) and not key.removeprefix(TEXT_TOWER).startswith(TEXT_TOWER_UNUSED)
    }
    if wrong := [key for key, value in tensors.items() if value.dtype not in FLOATS]:
        raise PromptError(f"{TEXT_TOWER}{wrong[0]} is {tensors[wrong[0]].dtype}, expected a float type; fetch the file "
                          "again")  # fmt: skip
    if not tensors or "to_text_latent.weight" not in state or "temperature" not in state:
        raise PromptError(
            "no text tower found in the file, expected one, because it encodes the prompts; "
            "use a zero-shot or VocabFine file"
        )
    return tensors


def bert_sizes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """BertConfig's arguments, read off the shapes; the attention heads by the width. Raises PromptError."""

    def shape(key: str) -> torch.Size:
        if key not in tensors or tensors[key].ndim != 2:
            raise PromptError(f"no matrix {TEXT_TOWER}{key} found in the file, expected BERT's; fetch the file again")
        return tensors[key].shape

    words, width = shape("embeddings.word_embeddings.weight")
    if width not in ATTENTION_HEADS:
        known = " or ".join(map(str, ATTENTION_HEADS))
        found = f"the text tower has width {width}, expected {known}"
        raise PromptError(f"{found}: no shape tells the number of attention heads; add it to ATTENTION_HEADS")
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": len({key.split(".")[2] for key in tensors if key.startswith("encoder.layer.")}),
        "num_attention_heads": ATTENTION_HEADS[width],
        "intermediate_size": shape("encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape("embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape("embeddings.token_type_embeddings.weight")[0],
    }


def _text_tower(state: dict[str, Tensor]) -> BertModel:
    """The checkpoint's BERT in float32 and evaluation mode. It uses the given (perhaps mapped) tensors without a copy.

    Raises PromptError for missing, extra or misshapen tensors.
    """
    tensors = {key: value.float() for key, value in text_tower_tensors(state).items()}
    sizes = bert_sizes(tensors)
    with _transformers_needed():
        from transformers import BertConfig, BertModel
        from transformers.utils import logging

        with _errors_only(logging), torch.device("meta"):  # no memory, no random numbers
            tower = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    expected, found = ({key: value.shape for key, value in side.items()} for side in (tower.state_dict(), tensors))
    wrong = sorted(TEXT_TOWER + key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise PromptError(f"the text tower has missing, extra or misshapen tensors ({_first_five(wrong)}), expected "
                          "BERT's; fetch the file again")  # fmt: skip
    tower.load_state_dict(tensors, assign=True)
    return tower.eval()


@torch.no_grad()
def text_latents(state: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids and mask (n, S), int64, 1 where there is a token -> latents (n, L) float32, L2-normalised.

    The amount of padding changes nothing. Raises PromptError where `state` has no usable text tower.
    """
    tower, projection = _text_tower(state), state["to_text_latent.weight"].float()
    rows = []
    for part, part_mask in zip(ids.split(PROMPTS_AT_ONCE), mask.split(PROMPTS_AT_ONCE), strict=True):
        positions = torch.arange(part.shape[1]).expand_as(part)  # given, because the tower's own stayed on meta
        hidden = tower(
            input_ids=part, attention_mask=part_mask, token_type_ids=torch.zeros_like(part), position_ids=positions
        ).last_hidden_state  # (n, S, width)
        rows.append(F.normalize(F.linear(hidden[:, 0], projection), dim=-1))
    return torch.cat(rows)


def prompt_weights(state: dict[str, Tensor], prompts: Prompts, vocabulary: Path) -> Tensor:
    """-> weight (n, L) float32 of a linear head without bias on L2-normalised image latents; its sigmoid is p(present).

    `state`: of a CT-CLIP file, prefixes removed; `vocabulary`: the tower's vocab.txt. Raises PromptError.
    """
    sizes, pieces = bert_sizes(text_tower_tensors(state)), read_vocabulary(vocabulary)
    if len(pieces) != sizes["vocab_size"]:
        raise PromptError(
            f"{vocabulary}: found {len(pieces)} lines, expected {sizes['vocab_size']}, one for each row of the file's "
            f"word embeddings; fetch {VOCABULARY_REPOSITORY}'s vocab.txt again"
        )
    ids, mask = tokenise(prompts, pieces, sizes["max_position_embeddings"])
    latents = text_latents(state, ids, mask)
    return state["temperature"].float().reshape(()).exp() * (latents[0::2] - latents[1::2])


# -- Slice backbones ---------------------------------------------------------------------------------------------------


def _hub_answers() -> bool:
    """Whether anything answers at the hub's address within 5 s; also where only Python refuses its certificate."""
    from huggingface_hub import constants

    try:
        urlopen(constants.ENDPOINT, timeout=5).close()
    except HTTPError:
        return True
    except (OSError, HTTPException, ValueError) as error:  # the last: HF_ENDPOINT is no address
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def _cached_weights(name: str) -> str | None:
    """A timm model's ImageNet weights in the hub client's cache; None where they are not."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    repository = str(getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or "none")
    found = (try_to_load_from_cache(repository, file) for file in ("model.safetensors", "pytorch_model.bin"))
    return next((path for path in found if isinstance(path, str)), None)


def timm_folder(name: str, pretrained: bool) -> Path | None:
    """The folder in timm's layout (config.json, weights) that `name` stands for: a path, or hf-hub:OWNER/NAME, fetched
    into the hub client's cache, with the weights where `pretrained`. None for timm's own names. Raises ValueError and
    PretrainedWeightsError."""
    import timm
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    source, _, place = name.partition(":")
    if source not in HUB_SOURCES:
        folder = Path(place if source == "local-dir" else name)
        known = source != "local-dir" and timm.is_model(name.split(".")[0])
        return folder if folder.is_dir() and not known else None
    repository, _, revision = place.partition("@")
    offline = constants.HF_HUB_OFFLINE or not _hub_answers()
    fetch = partial(hf_hub_download, repository, revision=revision or None, local_files_only=offline)
    try:
        with _errors_only(hub_logging):
            folder = Path(fetch("config.json")).parent
            if pretrained:
                try:
                    fetch(TIMM_WEIGHTS[0])
                except EntryNotFoundError:
                    fetch(TIMM_WEIGHTS[1])
    except Exception as error:  # no network, no access, no such repository, or a login page in its place
        raise PretrainedWeightsError(
            f"'{name}' could not be fetched ({type(error).__name__}: {_first_sentence(error)}). Connect to the network "
            "(and accept its terms on the hub where it has any), or name a folder of its config.json and weights"
        ) from error
    return folder


def architecture_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in NOT_OF_ARCHITECTURES}


def read_timm_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in timm's layout -> architecture, its arguments, and what its weights were trained with.
    Raises ValueError."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        trained = content.get("pretrained_cfg", content)  # timm once wrote both as one
        kept = ("mean", "std", "input_size", "fixed_input_size", "classifier", "first_conv")
        return {
            "architecture": str(content["architecture"]),
            "model_args": architecture_arguments(content.get("model_args") or {}),
            "pretrained_cfg": {key: trained[key] for key in kept if trained.get(key) is not None},
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {_first_sentence(error)}"
        raise ValueError(f"{folder}: found no config.json of timm's ({reason}), expected one that names the "
                         "architecture; copy it from where the weights are") from error


def weights_in(folder: Path) -> Path:
    """The weights of a folder in timm's layout. Raises CheckpointError."""
    check_no_other_folder(folder)
    found = next((folder / name for name in TIMM_WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        missing = f"{folder}: found no {' and no '.join(TIMM_WEIGHTS)}"
        raise CheckpointError(f"{missing}, expected weights in timm's layout; copy them there, or name a file of them "
                              "(--backbone-weights, backbone_weights=)")
    return found


def create_backbone(
    name: str, pretrained: bool, config: dict[str, Any] | None = None, size: int | None = None
) -> nn.Module:
    """A timm model without pooling and classifier; as `config` (`read_timm_config`) says; for images of `size` where
    it takes one size only. Raises ValueError for a name that timm does not know and PretrainedWeightsError when
    ImageNet weights are asked for and cannot be had."""
    import timm
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging
    from timm.models import PretrainedCfg

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        close = ", ".join(get_close_matches(architecture, timm.list_models(), n=3)) or "timm.list_models()"
        raise ValueError(f"'{name}' is not a timm model; close names: {close}")
    options: dict[str, Any] = {}
    if config is not None:
        options = architecture_arguments(config["model_args"]) | {"pretrained_cfg_overlay": config["pretrained_cfg"]}
    trained = asdict(timm.get_pretrained_cfg(name) or PretrainedCfg()) | options.get("pretrained_cfg_overlay", {})
    if size is not None and trained["fixed_input_size"]:
        options["img_size"] = size
    try:
        if pretrained and not constants.HF_HUB_OFFLINE and not _hub_answers():
            # The client would retry every file name for 23 s. Its own switch would hold for other threads too.
            if (file := _cached_weights(name)) is None:
                raise OSError("no answer from the hub, and not in its cache here")
            options["pretrained_cfg_overlay"] = {"file": file}
        with _errors_only(hub_logging):  # not a dozen lines of retries: the one that counts is raised below
            return timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **options)
    except Exception as error:  # no network, no access, no such weights, or a login page in their place
        if (config or size) and isinstance(error, (TypeError, AssertionError)):  # of timm's constructors
            asked = f"model_args {config['model_args']}" if config else f"a size of {size}"
            raise ValueError(f"'{name}' does not take {asked} ({_first_sentence(error)}); correct it") from error
        if not pretrained or isinstance(error, MemoryError):
            raise
        raise PretrainedWeightsError(
            f"ImageNet weights of '{name}' could not be fetched ({type(error).__name__}: {_first_sentence(error)}). "
            "Connect to the network, name a file of them (--backbone-weights, backbone_weights=), or start from random "
            "weights on purpose with --no-pretrained (pretrained=False)"
        ) from error


# Names of parts in the layout of the package efficientnet_pytorch and what follows it -> timm's; of a block, whether it
# expands its channels or not.
EFFICIENTNET_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
                     "_fc": "classifier"}  # fmt: skip
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"} | SQUEEZE
EXPANDING_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                   "_project_conv": "conv_pwl", "_bn2": "bn3"} | SQUEEZE  # fmt: skip


def _efficientnet_names(net: Any) -> dict[str, str]:
    """{part in the layout of efficientnet_pytorch, which counts the blocks through all stages: the part in timm's}"""
    blocks = [(f"blocks.{i}.{j}", block) for i, stage in enumerate(net.blocks) for j, block in enumerate(stage)]
    names = dict(EFFICIENTNET_ENDS)
    for number, (place, block) in enumerate(blocks):
        parts = EXPANDING_BLOCK if hasattr(block, "conv_pwl") else PLAIN_BLOCK
        names |= {f"_blocks.{number}.{part}": f"{place}.{name}" for part, name in parts.items()}
    return names


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _in_timm_layout(state: dict[str, Tensor], net: Any, name: str) -> dict[str, Tensor]:
    """Tensors under timm's names: what wrappers put before them is removed, and another layout of the family, where
    timm or this module knows it, is converted. Raises ValueError."""
    state = {_unwrapped(key): value for key, value in state.items()}
    if "_conv_stem.weight" in state:
        if not name.startswith("tf_efficientnet"):
            raise ValueError(f"weights for TensorFlow's padding, expected those of '{name}', which pads as PyTorch "
                             f"does; use --model tf_{name}")  # fmt: skip
        names = _efficientnet_names(net)
        parts = {key: key.rpartition(".") for key in state}
        return {f"{names.get(part, part)}.{last}": state[key] for key, (part, _, last) in parts.items()}
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # timm's, of many families
    try:
        return convert(state, net) if convert else state
    except Exception as error:  # whatever tensors that it does not expect lead it to
        reason = f"{type(error).__name__}: {_first_sentence(error)[:100]}"
        raise ValueError(f"other weights ({reason}), expected those of '{name}'; name their --model") from error


def load_backbone(net: Any, name: str, path: Path) -> LoadReport:
    """Gives a timm model the tensors of a file (.pt, .pth, .safetensors): each of the model's, and of the file's all
    but timm's own classifier. Raises CheckpointError; then nothing was loaded."""
    if not path.is_file():
        raise CheckpointError(f"{path}: found no such file, expected weights of '{name}'; check --backbone-weights")
    try:
        state = _in_timm_layout(read_tensors(path), net, name)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: found {error}") from error
    classifier = net.pretrained_cfg.get("classifier") or ()
    starts = tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))
    dropped = [key for key in state if key not in net.state_dict() and key.startswith(starts)]
    return _load_all_but(net, state, {"timm's classifier": dropped}, (), f"timm's '{name}'", path)


def _load_all_but(
    net: nn.Module, state: dict[str, Tensor], dropped: dict[str, list[str]], new: Sequence[str], name: str, path: Path
) -> LoadReport:
    """Gives `net` the tensors of a file's `state`: all of its own but `new`, of the file's all but those that are
    `dropped` ({reason: keys}). Raises CheckpointError; then nothing was loaded."""
    own, excused = net.state_dict(), {key for keys in dropped.values() for key in keys}
    counters = [key for key in own if key not in state and key.endswith(".num_batches_tracked")]  # torch < 0.4.1
    used = {key: state[key] for key in own if key in state and key not in excused}
    problems = {
        "missing": [key for key in own if key not in used and key not in counters and key not in new],
        "unexpected": [key for key in state if key not in own and key not in excused],
        "wrong shape or type": [f"{key} {misfit}" for key in used if (misfit := _misfit(used[key], own[key]))],
    }
    if listed := [f"{len(keys)} {problem}: {_first_five(sorted(keys))}" for problem, keys in problems.items() if keys]:
        raise CheckpointError(f"{path} does not fit {name} ({'; '.join(listed)}), expected all of its tensors "
                              "and no more; give weights of that model, in its own layout")  # fmt: skip
    check_finite(used, path)
    net.load_state_dict(own | used)
    reasons = {reason: len(keys) for reason, keys in dropped.items() if keys}
    counters = [key for key in counters if key not in new]
    return LoadReport(str(path), len(used), reasons, (*new, *counters), "linear, new")


def parse_window(text: str) -> tuple[float, float, float | None, float | None]:
    """"lung" (WINDOWS), "LOW:HIGH" or "LOW:HIGH:MEAN:STD", all in HU -> low, high, and mean and deviation where given.
    Raises ValueError."""
    if text in WINDOWS:
        level, width = WINDOWS[text]
        return level - width / 2, level + width / 2, None, None
    try:
        low, high, *scaling = (float(part) for part in text.split(":"))
        mean, std = scaling or (None, None)
        if not -math.inf < low < high < math.inf or (std is not None and not 0 < std < math.inf):
            raise ValueError
    except ValueError:
        names = ", ".join(WINDOWS)
        raise ValueError(f"found the window {text!r}, expected {names}, LOW:HIGH or LOW:HIGH:MEAN:STD in HU, such as "
                         "-1000:200; correct it") from None
    return low, high, mean, std


class SliceBackbone(nn.Module):
    """Any timm model as a feature extractor for three adjacent axial slices.

    (B, 3, H, W) in [-1, 1] (HU / 1000) -> feature map (B, C, h, w). A backbone of three channels takes the three
    slices, one of one channel the middle one. From [-1, 1], or from the one window, values go to [0, 1] and then to the
    mean and deviation that the backbone was trained with, or to those that a window names. Several windows are channels
    of the middle slice. Transformers' patch tokens are laid out as their grid.
    """

    net: Any
    mean: Tensor
    std: Tensor
    window: Tensor | None  # (4, windows, 1, 1) or (4, C, 1, 1): low and high in HU / 1000, then a factor and a summand

    def __init__(
        self, name: str, pretrained: bool, config: dict[str, Any] | None = None, size: int | None = None,
        windows: Sequence[str] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.net = create_backbone(name, pretrained, config, size)
        self.dim: int = self.net.num_features
        self.map_number: int | None = None  # of timm's feature maps, where `end_at` has chosen one
        trained, arguments = self.net.pretrained_cfg, config["model_args"] if config else {}
        self.channels = int(arguments.get("in_chans", 3))
        self.takes_middle = self.channels != 3 or len(windows or ()) > 1
        self._set_scaling([parse_window(text) for text in windows or ()], trained["mean"], trained["std"])
        self.size: tuple[int, int] | None = None
        if trained.get("fixed_input_size", False) and not arguments.get("dynamic_img_size"):
            given = size or arguments.get("img_size") or trained["input_size"][-2:]
            self.size = (given, given) if isinstance(given, int) else (given[0], given[1])
        patch = getattr(getattr(self.net, "patch_embed", None), "patch_size", (1, 1))
        if size is not None and (size % patch[0] or size % patch[1]):
            nearest = max(1, round(size / patch[0])) * patch[0]
            raise ValueError(f"found slices of {size} pixels, expected a multiple of {patch[0]}, the patch of "
                             f"'{name}'; take {nearest}")

    def _set_scaling(self, windows: list[tuple], mean: Sequence[float], std: Sequence[float]) -> None:
        """Raises ValueError where windows, mean and deviation do not fit the number of channels."""
        count = len(windows)
        if count not in (0, 1, self.channels) or (count == 0 and self.channels not in (1, 3)):
            ways = {1: "none or one", 3: "none, one or 3"}.get(self.channels, f"one or {self.channels}")
            raise ValueError(f"found {count} windows for a backbone of {self.channels} channels, expected {ways}")
        if len({*mean}) == len({*std}) == 1:
            mean, std = ([values[0]] * self.channels for values in (mean, std))
        scaled = bool(windows) and all(window[2] is not None for window in windows)
        if not len(mean) == len(std) == self.channels:
            if not scaled:
                raise ValueError(
                    f"found a mean of {len(mean)} channels for a backbone of {self.channels}, expected one of each; "
                    "give the windows with their own (LOW:HIGH:MEAN:STD in HU)"
                )
            mean, std = [0.0] * self.channels, [1.0] * self.channels
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        rows = []
        for channel in range(self.channels if windows else 0):
            low, high, own_mean, own_std = windows[channel % count]
            if own_mean is None:  # to [0, 1] first
                own_mean, own_std = low + (high - low) * mean[channel], (high - low) * std[channel]
            rows.append((low / 1000, high / 1000, 1000 / own_std, -own_mean / own_std))
        self.register_buffer("window", torch.tensor(rows).T[..., None, None] if rows else None, persistent=False)

    def scaled(self, slices: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> what the backbone takes, (B, channels, H, W)."""
        if self.takes_middle:
            slices = slices[:, 1:2]
        if self.window is None:
            return ((slices + 1) / 2 - self.mean) / self.std
        low, high, factor, summand = self.window
        return torch.minimum(torch.maximum(slices, low), high) * factor + summand

    def end_at(self, stride: int) -> None:
        """Makes the last feature map that has a place for each `stride` x `stride` pixels the output; the layers after
        it are removed. Raises ValueError for a network without such a map, and for one whose maps have one size."""
        name = self.net.pretrained_cfg["architecture"]
        found = f"found a feature stride of {stride} for '{name}'"
        known = hasattr(self.net, "forward_intermediates") and hasattr(self.net, "prune_intermediate_layers")
        strides = [info["reduction"] for info in self.net.feature_info] if known else []
        if len({*strides}) < 2:
            maps = f"has feature maps of stride {strides[0]} only" if strides else "gives no intermediate feature maps"
            raise ValueError(f"{found}, which {maps}, expected a convolutional or hierarchical network, such as "
                             "efficientnet_b0; take one, or leave the stride out")  # fmt: skip
        if stride not in strides:
            expected = f"expected {', '.join(map(str, sorted({*strides})))}"
            raise ValueError(f"{found}, {expected}; take one of these")
        self.map_number = len(strides) - 1 - strides[::-1].index(stride)
        self.dim = self.net.feature_info[self.map_number]["num_chs"]
        self.net.prune_intermediate_layers([self.map_number], prune_norm=True)

    @property
    def has_class_token(self) -> bool:
        has = getattr(self.net, "cls_token", None) is not None and self.net.num_prefix_tokens > 0
        return has and self.map_number is None

    def forward(self, slices: Tensor) -> Tensor:
        return self.map_of(self.forward_features(slices), slices.shape)

    def forward_features(self, slices: Tensor) -> Tensor:
        """What the backbone's own does, up to the map that `end_at` has chosen: a feature map, or (B, tokens, C)."""
        if self.size and slices.shape[-2:] != self.size:
            slices = F.interpolate(slices, self.size, mode="bilinear", antialias=True)
        if self.map_number is None:
            return self.net.forward_features(self.scaled(slices))
        options = {"indices": [self.map_number], "intermediates_only": True, "stop_early": True}
        return self.net.forward_intermediates(self.scaled(slices), **options)[0]

    def map_of(self, features: Tensor, shape: Sequence[int]) -> Tensor:
        """Of slices of `shape` (..., H, W) -> (B, C, h, w)"""
        if features.ndim == 3:  # (B, tokens, C), class tokens first
            patches = features[:, getattr(self.net, "num_prefix_tokens", 0) :].transpose(1, 2)
            height, width = self.size or shape[-2:]
            return patches.unflatten(-1, (round(math.sqrt(patches.shape[-1] * height / width)), -1))
        return features if features.shape[1] == self.dim else features.movedim(-1, 1)  # some are channels-last

    def tokens(self, slices: Tensor, kind: str) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C): of kind "patch" the feature map, of kind "slice" (B, 1, 1, C) the class token,
        or the map's mean where the backbone has none."""
        features = self.forward_features(slices)
        if kind == "slice" and self.has_class_token:
            return features[:, None, :1]
        return as_tokens(self.map_of(features, slices.shape), kind)


def slices_at(spacing: float) -> int:
    """How many slices a volume has at so many mm. Raises ValueError."""
    if not 0.5 <= spacing <= FIELD_OF_VIEW_MM / 2:
        raise ValueError(f"found slices {spacing:g} mm apart, expected 0.5 to {FIELD_OF_VIEW_MM / 2:g}; correct it")
    return round(FIELD_OF_VIEW_MM / spacing)


def slice_triplets(volume: Tensor, count: int, chosen: Tensor | None = None) -> Tensor:
    """(B, 1, D, H, W) -> (B, S, 3, H, W): `count` evenly spaced slices, each between its two neighbours; of these those
    that are `chosen`, (B, N) -> (B, N, 3, H, W)."""
    depth = volume.shape[2]
    if depth < 3:
        raise ValueError(f"a volume of {depth} slices has no three adjacent ones; expected (B, 1, D, H, W) with D >= 3")
    centres = ((torch.arange(count) + 0.5) * depth / count).long().clamp(1, depth - 2)
    neighbours = torch.tensor([-1, 0, 1])
    if chosen is None:
        return volume[:, 0, (centres[:, None] + neighbours).to(volume.device)]
    index = (centres[chosen][..., None] + neighbours).to(volume.device)  # (B, N, 3)
    return volume[torch.arange(len(volume), device=volume.device)[:, None, None], 0, index]


def slices_at_once(device: torch.device) -> int:
    return SLICES_AT_ONCE_ON_CPU if device.type == "cpu" else SLICES_AT_ONCE


def random_slices(batch: int, count: int, most: int) -> Tensor:
    """(B, N) numbers of slices below `count`, ascending: for each volume a random one from each of N = `most` equal
    parts, so that a head's position terms, interpolated to N, hold to within a part."""
    drawn = (torch.arange(most) + torch.rand(batch, most)) * count / most
    return drawn.long().clamp(max=count - 1)


# -- Video ResNets -----------------------------------------------------------------------------------------------------


def kinetics_weights(name: str) -> Path:
    """torchvision's Kinetics-400 weights of a video ResNet: in torch.hub's cache, fetched where they are not there.
    Raises PretrainedWeightsError."""
    from torchvision.models import get_model_weights

    url: str = get_model_weights(name)["KINETICS400_V1"].url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if file.is_file():
        return file
    try:
        urlopen(url, timeout=5).close()  # what follows would wait for an answer without end
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), file.stem.rpartition("-")[2], progress=False)  # checks the hash
    except (OSError, HTTPException, RuntimeError) as error:
        raise PretrainedWeightsError(
            f"{url} (Kinetics-400 weights of '{name}') could not be fetched ({type(error).__name__}: "
            f"{_first_sentence(error)}). Connect to the network, name a file of them (--backbone-weights, "
            "backbone_weights=), or start from random weights on purpose with --no-pretrained (pretrained=False)"
        ) from error
    return file


class VideoBackbone(nn.Module):
    """A torchvision video ResNet as a feature extractor: (B, 1, D, H, W), HU / 1000 in [-1, 1] -> (B, 512, T, h, w).

    The first convolution has one channel, a kernel of `stem_stride` voxels along each axis and the same stride (after
    GreenRFM's stage 1), then batch norm and ReLU as torchvision's has. Values are rounded to whole HU, so that a file
    and an int16 copy of its volume are one input; then clipped to the window, which goes to [-1, 1], or to the mean and
    deviation that it names.
    """

    net: Any
    window: Tensor  # (4,): low and high in HU, then a factor and a summand

    def __init__(self, name: str, stem_stride: int, window: str):
        super().__init__()
        from torchvision.models import get_model

        if stem_stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride is {stem_stride!r}, expected {' or '.join(map(str, STEM_STRIDES))}")
        self.net = get_model(name, weights=None)
        self.dim: int = self.net.fc.in_features
        del self.net.fc, self.net.avgpool
        convolution = nn.Conv3d(1, 64, stem_stride, stem_stride, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        self.net.stem = nn.Sequential(convolution, nn.BatchNorm3d(64), nn.ReLU(inplace=True))
        low, high, mean, std = parse_window(window)
        if mean is None or std is None:
            mean, std = (low + high) / 2, (high - low) / 2
        self.register_buffer("window", torch.tensor([low, high, 1 / std, -mean / std]), persistent=False)
        self.checkpointing = False  # keep only the blocks' inputs for the backward pass and recompute the rest

    def scaled(self, volume: Tensor) -> Tensor:
        hu = volume * 1000
        hu = hu + (hu.round() - hu).detach()  # exact; with the gradient of `hu`
        low, high, factor, summand = self.window
        return torch.minimum(torch.maximum(hu, low), high) * factor + summand

    def forward(self, volume: Tensor) -> Tensor:
        x = self.net.stem(self.scaled(volume))
        for stage in (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4):
            for block in stage:
                again = self.checkpointing and torch.is_grad_enabled() and x.requires_grad
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        return x

    def group_matcher(self) -> dict:
        """timm's patterns that group parameters into layers, from input to output: the stem, then each block."""
        return {"stem": r"^net\.stem", "blocks": [(r"^net\.layer(\d)\.(\d)", None)]}

    def load(self, name: str, path: Path) -> LoadReport:
        """Weights of torchvision's own model, such as Kinetics', for all but the stem, which stays as it is. Raises
        CheckpointError; then nothing was loaded."""
        if not path.is_file():
            raise CheckpointError(f"{path}: found no such file, expected weights of '{name}'; check --backbone-weights")
        state = {_unwrapped(key): value for key, value in read_tensors(path).items()}
        dropped = {f"of its {part}": [key for key in state if key.startswith(f"{start}.")]
                   for start, part in (("stem", "stem"), ("fc", "classifier"))}  # fmt: skip
        stem = [key for key in self.net.state_dict() if key.startswith("stem.")]
        report = _load_all_but(self.net, state, dropped, stem, f"torchvision's '{name}'", path)
        return replace(report, assumed="; stem: new, of one channel")


def crop_starts(shape: Sequence[int], crop: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Where crops of a volume begin: the central one, or those of the eight corners."""
    room = [max(0, size - edge) for size, edge in zip(shape, crop, strict=True)]
    return [tuple(size // 2 for size in room)] if count == 1 else list(product(*((0, size) for size in room)))


# -- Any backbone ------------------------------------------------------------------------------------------------------


def _forward_on_meta(module: nn.Module, shape: tuple[int, ...]) -> None:
    """A forward pass without numbers, for its hooks."""
    state = {name: value.to("meta") for name, value in (*module.named_parameters(), *module.named_buffers())}
    with torch.no_grad():
        torch.func.functional_call(module, state, torch.zeros(1, *shape, device="meta"))


def _pool(maps: Tensor) -> Tensor:
    """(B, S, C, h, w) -> (B, C)"""
    return maps.mean((3, 4)).mean(1)


def as_tokens(maps: Tensor, kind: str) -> Tensor:
    """(..., C, h, w) -> (..., h, w, C), or of kind "slice" their mean (..., 1, 1, C)."""
    return (maps.mean((-2, -1), keepdim=True) if kind == "slice" else maps).movedim(-3, -1)


# -- Adapters ----------------------------------------------------------------------------------------------------------

LORA_TARGETS = ("attn.qkv", "attn.proj", "patch_embed.proj")  # ends of the names of a vision transformer's layers


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank change (Hu et al. 2021): W x + b + alpha / rank * B A dropout(x). B starts at 0,
    so that at the start nothing has changed; W and b keep their names."""

    lora_a: nn.Parameter  # (rank, inputs)
    lora_b: nn.Parameter  # (outputs, rank)
    lora_dropout: nn.Dropout
    lora_scale: float

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        _adapt(self, base, rank, alpha, dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.lora_dropout(x), self.lora_a)
        return super().forward(x) + self.lora_scale * F.linear(low, self.lora_b)

    def merged(self) -> nn.Linear:
        return _merged(self, nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))


class LoRAConv2d(nn.Conv2d):
    """LoRALinear for a convolution, such as a patch embedding: A has the kernel, B mixes channels."""

    lora_a: nn.Parameter  # (rank, inputs, h, w)
    lora_b: nn.Parameter  # (outputs, rank)
    lora_dropout: nn.Dropout
    lora_scale: float

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, dropout: float):
        super().__init__(**_of_convolution(base))
        _adapt(self, base, rank, alpha, dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = self._conv_forward(self.lora_dropout(x), self.lora_a, None)
        return super().forward(x) + self.lora_scale * F.conv2d(low, self.lora_b[:, :, None, None])

    def merged(self) -> nn.Conv2d:
        return _merged(self, nn.Conv2d(**_of_convolution(self)))


ADAPTED: dict[type, Any] = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def _of_convolution(layer: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None, "device": "meta"}


def _adapt(layer: Any, base: Any, rank: int, alpha: float, dropout: float) -> None:
    layer.weight, layer.bias = base.weight, base.bias
    layer.lora_a = nn.Parameter(base.weight.new_empty(rank, *base.weight.shape[1:]))
    layer.lora_b = nn.Parameter(base.weight.new_zeros(len(base.weight), rank))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
    layer.lora_dropout, layer.lora_scale = nn.Dropout(dropout), alpha / rank


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """W + alpha / rank * B A"""
    return layer.weight + layer.lora_scale * (layer.lora_b @ layer.lora_a.flatten(1)).view_as(layer.weight)


def _merged(layer: Any, plain: Any) -> Any:
    plain.weight, plain.bias = nn.Parameter(merged_weight(layer), layer.weight.requires_grad), layer.bias
    return plain.train(layer.training)


# -- The model ---------------------------------------------------------------------------------------------------------


class ScaleCheck:
    """Warns, once per process, of an input that cannot be HU / 1000. It looks at a model's first batches only, and at
    some of their values: on a GPU each look waits for the batch."""

    VALUES = 2**14
    warned = False  # in this process

    def __init__(self) -> None:
        self.batches_left = 3

    def __call__(self, x: Tensor) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or ScaleCheck.warned or not self.batches_left:
            return
        self.batches_left -= 1
        axes = x.ndim - 2
        step = max(1, math.ceil((x.numel() / self.VALUES) ** (1 / axes)))
        sample = x.detach()[(Ellipsis,) + (slice(None, None, step),) * axes]
        with suppress(RuntimeError):  # no values: an empty batch, the meta device, torch.func.vmap
            low, high = torch.stack(sample.float().aminmax()).tolist()
            if low < high and (kind := self.kind(low, high)):
                ScaleCheck.warned = True
                warnings.warn(
                    f"input from {low:.3g} to {high:.3g}, which looks like {kind}; expected HU / 1000 in [-1, 1] with "
                    "air at -1, or the logits mean nothing: take ctclip.data.slices(path) or preprocess_volume(path)",
                    stacklevel=5,  # whoever called the model
                )

    @staticmethod
    def kind(low: float, high: float) -> str | None:
        """What values from `low` to `high` look like; None for HU / 1000."""
        if low < -10:
            return "HU"
        if low >= 0:
            return "pixel values from 0 to 1" if high <= 1 else "pixel values from 0 to 255" if high <= 255 else "HU"
        return "values normalised by a mean and a deviation, such as ImageNet's" if max(-low, high) > 1.5 else None


def _label_names(head: str | None, prompts: Prompts | None, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the logits, by the constructor's arguments."""
    if prompts is not None and head != "prompts":
        raise ValueError(f"prompts go with head='prompts', found head={head!r}; leave one of them out")
    default = ABNORMALITIES if prompts is None else prompts.names
    names = default if labels is None else tuple(labels)
    if prompts is not None and names != prompts.names:
        raise ValueError("found labels that are not the prompts' names in their order; leave labels out")
    if names != ABNORMALITIES and head != "prompts":
        found = f"found {len(names)} labels of your own with head={head!r}, which has the 18"
        raise ValueError(f"{found}; leave them out, and call reset_classifier(labels=...) for a new head")
    return names


HEAD_PREFIXES = ("attention.", "classifier.")  # of all parameters outside the backbone
HEAD_LEARNING_RATE = {"ctclip": 3e-2, "others": 1e-3}  # with the defaults of `parameter_groups`: the scripts'
SLICES_AT_ONCE, SLICES_AT_ONCE_ON_CPU = 64, 4  # encoded without gradients; 4: their activations stay in its caches
LATENTS_AT_ONCE = 64  # computed from codes: 75 MB of intermediate values at the published size


class CTCLIPMultiAbnormalityModel(nn.Module, PyTorchModelHubMixin):
    """18-label chest CT classifier on CT-CLIP (`ctclip_path` given), or with `ctclip_path=None` on a slice backbone of
    timm's or a video ResNet of torchvision's.

    Args:
        ctclip_path: a CT-CLIP, VocabFine or ClassFine file, .pt or .safetensors; layout and sizes are read from it.
        backbone: used when `ctclip_path` is None: a timm name, hf-hub:OWNER/NAME, or a folder in timm's layout
            (config.json, weights), whose architecture, arguments, mean and deviation it takes; or one of VIDEO_MODELS,
            which sees crops of a whole volume.
        attention: None, or "cbam" for channel and spatial attention on the slice backbone's feature map.
        pretrained: ImageNet weights for the slice backbone, or those of its folder; Kinetics-400's for a video ResNet.
        backbone_weights: a file of weights for the backbone, .pt, .pth or .safetensors, instead of these.
        n_slices: number of slice triplets that the slice variant takes from a volume (cost and memory grow with it).
        dropout: in the head, in training.
        sizes: of a CT-CLIP tower with random weights, for `from_pretrained` and for training one from scratch.
        head: of a slice backbone "linear" (default), on the mean over slices, "attention" (QueryHead) or "max"
            (MaxHead). Of a CT-CLIP variant: None: the head that the file has, else the prompt head. Where that cannot
            be made (see `load_report.no_prompts_reason`), and with "linear" for such a file, the head is new and its
            logits are exactly 0. "attention" is always new; "mlp" starts with the linear head's logits.

            | head      | takes           | parameters | step     | when                                               |
            |-----------|-----------------|------------|----------|----------------------------------------------------|
            | linear    | latent          | 0.01 M     | < 0.1 ms | hundreds of volumes; ClassFine's logits; baseline  |
            | mlp       | latent          | 0.15 M     | < 0.1 ms | thousands of volumes; refines linear               |
            | attention | codes or tokens | 0.07 M     | 7 ms     | small findings, which a mean over depth averages   |
            | prompts   | latent, signed  | 0.01 M     | < 0.1 ms | no training: zero-shot; any findings, in words     |

            At the published size; step: forward and backward pass per cached volume, in batches of 16, on one CPU core.
        prompts: with head="prompts", the findings and their wording (default: the published one). Making that head
            needs the package transformers and the text tower's vocabulary; a saved model needs neither.
        labels: names of the logits, in order; default: the prompts' names, or ABNORMALITIES. Other names than these 18
            need head="prompts".
        new_head: leave a file's head aside, such as one for other findings, and start with a new one.
        windows: of a slice backbone: HU windows of its channels (`parse_window`). None: HU / 1000 in [-1, 1] as it is.
            Of a video ResNet: the one window; None: VIDEO_WINDOW.
        slice_spacing: mm between the slices that a slice backbone takes, over 360 mm, in place of `n_slices`; below 3
            mm volumes are resampled to as many slices. Of a video ResNet's volumes, in place of 3.
        slice_size: pixels of a slice along each side of 360 mm, in place of 224 (240 of a video ResNet's); position
            embeddings of a transformer are resampled to it.
        feature_stride: of a slice backbone that is convolutional or hierarchical: pixels along each side of a place of
            the feature map that the head takes, such as 16. None: the last map, in most networks of stride 32. An
            earlier map is finer and has fewer channels; the layers after it are removed.
        timm_config: what `read_timm_config` says of a folder, in a saved model.
        tokens: what a slice backbone's head "attention" or "max" pools: "slice", one token of each slice triplet (its
            class token, or the mean of its feature map), or "patch", every place of the map.
        stem_stride: of a video ResNet: kernel and stride of its first convolution, one of STEM_STRIDES.
        crop: of a video ResNet: edge of a crop as a share of the volume's. A larger volume is cropped to it: centrally,
            or with test_crops=8, in evaluation mode, at its corners, and features are the mean of eight. Random crops
            are ctclip.data.augmentation's.

    Raises:
        FileNotFoundError: `ctclip_path` does not exist. It is never replaced by random weights.
        CheckpointError: the file is not, or not only, a CT-CLIP checkpoint; or head="prompts" cannot be made from it;
            or `backbone_weights` are not those of `backbone`.
        PretrainedWeightsError: ImageNet's or Kinetics' weights cannot be fetched.
    """

    # What tells kinds of backbones apart, set where one is built.
    backbone: Any  # SliceBackbone or VideoBackbone; CT-CLIP has none
    input_shape: tuple[int, int, int]  # (D, H, W) of the volumes that preprocessing should produce for this model
    crop_shape: tuple[int, int, int]  # of a video ResNet: (D, H, W) of what passes through it at once
    cache_format: str  # what `encode_for_cache` gives: "codes", "pooled", "tokens" or "maps"
    backbone_modules: tuple[str, ...]  # what unfreezing trains: the encoder, and what follows it
    layered_module: str  # whose parameters timm groups into layers
    _hub_mixin_config: dict[str, Any]

    def __init__(
        self,
        ctclip_path: str | os.PathLike | None = CLASSFINE_PATH,
        backbone: str = "efficientnet_b0",
        attention: str | None = None,
        pretrained: bool = True,
        n_slices: int = 8,
        dropout: float = 0.3,
        sizes: dict[str, int] | None = None,
        head: str | None = None,
        prompts: Prompts | None = None,
        labels: Sequence[str] | None = None,
        new_head: bool = False,
        backbone_weights: str | os.PathLike | None = None,
        tokens: str = "slice",
        windows: Sequence[str] | None = None,
        slice_spacing: float | None = None,
        slice_size: int | None = None,
        feature_stride: int | None = None,
        timm_config: dict[str, Any] | None = None,
        stem_stride: int = 2,
        crop: float = 0.8,
        test_crops: int = 1,
    ):
        super().__init__()
        is_ctclip = ctclip_path is not None or sizes is not None
        if head not in (None, *HEADS, *SLICE_HEADS):
            known = ", ".join(dict.fromkeys(HEADS + SLICE_HEADS))
            raise ValueError(f"head='{head}' is not known; expected one of {known}")
        if head not in (None, *SLICE_HEADS) and not is_ctclip:
            takes = " or ".join(repr(name) for name in SLICE_HEADS)
            raise ValueError(f"head='{head}' is for CT-CLIP; a slice backbone (ctclip_path=None) takes head={takes}")
        if head == "max" and is_ctclip:
            raise ValueError("head='max' is for slice backbones (ctclip_path=None); CT-CLIP takes head='attention'")
        if tokens not in SLICE_TOKENS:
            raise ValueError(f"tokens='{tokens}' is not known; expected one of {', '.join(SLICE_TOKENS)}")
        if attention is not None and is_ctclip:
            raise ValueError(f"attention='{attention}' is for slice backbones (ctclip_path=None), not for CT-CLIP")
        if backbone_weights is not None and is_ctclip:
            raise ValueError("backbone_weights are for slice backbones (ctclip_path=None); CT-CLIP's are ctclip_path")
        self.labels = _label_names(head, prompts, labels)
        self.dropout = nn.Dropout(dropout)
        self.head_name, self.tokens = head or "linear", tokens
        self.scale_check = ScaleCheck()
        self.sizes: TowerSizes | None = None
        self.load_report: LoadReport | None = None
        self.folder: Path | None = None  # the run or copy of one that `from_pretrained` loaded
        self.derived_from: str | None = None  # origin: "imagenet", "kinetics400", one of PUBLISHED_FILES or "other"
        if sizes is not None:
            self._build_tower(TowerSizes(**sizes), self.head_name)
        elif ctclip_path is not None:
            self._load_ctclip(existing_weights(ctclip_path), head, prompts or Prompts.from_names(self.labels), new_head)
        elif backbone in VIDEO_MODELS:
            if attention is not None or self.head_name != "linear":
                found = f"head={head!r} and attention={attention!r} with the video ResNet '{backbone}'"
                raise ValueError(f"found {found}, expected head='linear' (on its mean over a crop) and attention=None")
            slices = VIDEO_SLICES if slice_spacing is None else slices_at(slice_spacing)
            self.input_shape = (slices, *((slice_size or VIDEO_SIZE,) * 2))
            self._set_crops(crop, test_crops, stem_stride)
            self._build_video_variant(backbone, stem_stride, windows, pretrained, backbone_weights)
        else:
            folder = timm_folder(backbone, pretrained and backbone_weights is None)
            if folder is not None:
                timm_config = read_timm_config(folder)
                backbone = timm_config["architecture"]
                backbone_weights = backbone_weights or (weights_in(folder) if pretrained else None)
            if slice_spacing is not None:
                n_slices = slices_at(slice_spacing)
            self.input_shape = (max(SLICE_INPUT_SHAPE[0], n_slices if slice_spacing else 0),
                                *((slice_size,) * 2 if slice_size else SLICE_INPUT_SHAPE[1:]))  # fmt: skip
            network = partial(SliceBackbone, backbone, config=timm_config, size=slice_size, windows=windows)
            self._build_slice_variant(backbone, network, feature_stride, attention, pretrained, n_slices,
                                      backbone_weights)
        # What `from_pretrained` needs to rebuild the model without the files it came from.
        self._hub_mixin_config = {
            "ctclip_path": None,
            "sizes": None if self.sizes is None else asdict(self.sizes),
            "backbone": backbone,
            "attention": attention,
            "pretrained": False,
            "n_slices": n_slices,
            "dropout": dropout,
            "head": self.head_name,
            "tokens": tokens,
            "windows": None if windows is None else list(windows),
            "slice_spacing": slice_spacing,
            "slice_size": slice_size,
            "feature_stride": feature_stride,
            "timm_config": timm_config,
            "stem_stride": stem_stride,
            "crop": crop,
            "test_crops": test_crops,
            "labels": list(self.labels),
        }

    def _load_ctclip(self, path: Path, head: str | None, prompts: Prompts, new_head: bool) -> None:
        """Raises CheckpointError where head "prompts" is asked for and cannot be made."""
        state = read_checkpoint(path)
        try:
            sizes = TowerSizes.from_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        stored = "linear" if new_head else own_head(state)
        made: dict[str, Tensor] = {}
        reason = None
        if head == "prompts" or not (head or stored or any(key in state for key in LINEAR_HEAD_KEYS)):
            try:
                weight = prompt_weights(state, prompts, vocabulary_path(path))
                head, made = "prompts", dict(zip(LINEAR_HEAD_KEYS, (weight, torch.zeros(len(weight))), strict=True))
                state = read_checkpoint(path)  # mapped anew: the text tower's 0.4 GB leave memory
            except PromptError as error:
                if head is not None:
                    raise CheckpointError(f"{path}: {error}") from error
                reason = str(error)
        if not (made or new_head) and any(key.startswith("classifier.") for key in state):
            check_label_order(path)
        # On the meta device nothing is drawn for what the file replaces.
        self._build_tower(sizes, head or stored or "linear", torch.device("meta"))
        report = load_tower(self, state, path, made, reason, new_head)
        if settings := settings_among_tensors(path):
            report = replace(report, dropped=report.dropped | {f"no tensors ({_first_five(settings)})": len(settings)})
        patch = f"; patches of {sizes.temporal_patch} x {sizes.patch} x {sizes.patch} voxels assumed"
        self.load_report = report if FIRST_FRAME in state else replace(report, assumed=patch)
        self.derived_from = PHANTOM_WEIGHTS if is_demo(path) else published_name(path)

    def _build_tower(self, sizes: TowerSizes, head: str, device: torch.device | None = None) -> None:
        """The image tower, on `device`, and its head."""
        with device or nullcontext():
            self.visual_transformer = VisualTransformer(sizes)
            self.to_visual_latent = nn.Linear(sizes.grid**2 * sizes.dim, sizes.latent, bias=False)
        self.classifier = create_head(head, sizes, self.dropout.p, len(self.labels))
        self.sizes, self.head_name = sizes, head
        self.input_shape, self.cache_format, self.layered_module = sizes.input_shape, "codes", "visual_transformer"
        self.backbone_modules = ("visual_transformer", "to_visual_latent")
        if head == "attention":
            self.to_visual_latent.requires_grad_(False)  # not used for the logits; kept for `encode`
            self.backbone_modules = ("visual_transformer",)

    def _build_slice_variant(
        self, backbone: str, network: Callable[..., SliceBackbone], feature_stride: int | None, attention: str | None,
        pretrained: bool, n_slices: int, weights: str | os.PathLike | None,
    ) -> None:  # fmt: skip
        if attention not in (None, "cbam"):
            raise ValueError(f"attention='{attention}' is not known; expected None or 'cbam'")
        from timm.layers import create_attn

        if type(n_slices) is not int or n_slices < 1:
            raise ValueError(f"n_slices is {n_slices!r}, expected a whole number of at least 1")
        self.n_slices = n_slices
        self.train_slices: int | None = None  # in training mode, so many random ones of each volume (random_slices)
        self.backbone = network(pretrained=pretrained and weights is None)
        if weights is not None:
            report = load_backbone(self.backbone.net, backbone, Path(weights))
            self.load_report = replace(report, head=f"{self.head_name}, new")
        if feature_stride is not None:
            self.backbone.end_at(feature_stride)
        self.attention = nn.Identity() if attention is None else create_attn(attention, self.backbone.dim)
        self.classifier = self._new_head(N_LABELS)
        self.derived_from = "other" if weights is not None else "imagenet" if pretrained else None
        self.cache_format = "maps" if attention else "pooled" if self.head_name == "linear" else "tokens"
        self.backbone_modules, self.layered_module = ("backbone",), "backbone.net"

    def _set_crops(self, crop: float, test_crops: int, stem_stride: int) -> None:
        """Raises ValueError."""
        if not 0 < crop <= 1:
            raise ValueError(f"crop is {crop}, expected a share above 0 and at most 1")
        if test_crops not in TEST_CROPS:
            raise ValueError(f"test_crops is {test_crops!r}, expected {' or '.join(map(str, TEST_CROPS))}")
        depth, height, width = (round(crop * size) for size in self.input_shape)
        self.crop_shape, self.test_crops = (depth, height, width), test_crops
        if min(self.crop_shape) < stem_stride or max(self.crop_shape) <= 8 * stem_stride:  # batch norm needs two places
            raise ValueError(f"found crops of {' x '.join(map(str, self.crop_shape))} voxels, expected at least "
                             f"{stem_stride} each way, and more than {8 * stem_stride} along one axis, for which the "
                             "last feature map has two places; take larger volumes or crops")  # fmt: skip

    def _build_video_variant(
        self, name: str, stem_stride: int, windows: Sequence[str] | None, pretrained: bool,
        weights: str | os.PathLike | None,
    ) -> None:  # fmt: skip
        if windows is not None and len(windows) != 1:
            raise ValueError(f"found {len(windows)} windows for a video ResNet, expected one; correct it")
        self.backbone = VideoBackbone(name, stem_stride, windows[0] if windows else VIDEO_WINDOW)
        if weights is not None or pretrained:
            self.load_report = self.backbone.load(name, kinetics_weights(name) if weights is None else Path(weights))
        self.classifier = self._new_head(N_LABELS)
        self.derived_from = "other" if weights is not None else "kinetics400" if pretrained else None
        self.cache_format, self.backbone_modules, self.layered_module = "pooled", ("backbone",), "backbone"

    def _new_head(self, outputs: int) -> nn.Module:
        """Its logits are exactly 0."""
        if self.sizes is not None:
            return create_head(self.head_name, self.sizes, self.dropout.p, outputs)
        if self.head_name == "linear":
            return zero_linear(self.backbone.dim, outputs)
        if self.head_name == "max":
            return MaxHead(self.backbone.dim, outputs)
        places = PLACES if self.tokens == "patch" else 1
        return QueryHead(self.backbone.dim, (self.n_slices, places, places), self.dropout.p, outputs)

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def is_ctclip(self) -> bool:
        return self.sizes is not None

    @property
    def is_video(self) -> bool:
        return not self.is_ctclip and isinstance(self.backbone, VideoBackbone)

    def backbone_parameters(self) -> list[nn.Parameter]:
        return [parameter for name in self.backbone_modules for parameter in self.get_submodule(name).parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        """Everything that is trained while the backbone is frozen (for the slice variant, the attention too)."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith(HEAD_PREFIXES)]

    def encoder_state(self) -> dict[str, Tensor]:
        """Every tensor that `encode_for_cache` depends on, by name; a cache of its output is keyed by these."""
        encoder = f"{self.backbone_modules[0]}."
        state = {key: value for key, value in self.merged_state().items() if key.startswith(encoder)}
        if self.is_ctclip:
            return state
        if self.is_video:
            crops = torch.tensor([*self.crop_shape, self.test_crops])
            return state | {"backbone.window": self.backbone.window, "backbone.crops": crops}
        fixed = {"mean": self.backbone.mean, "std": self.backbone.std, "n_slices": torch.tensor(self.n_slices)}
        if self.backbone.map_number is not None:
            fixed["map_number"] = torch.tensor(self.backbone.map_number)
        if self.cache_format == "tokens":
            fixed["patches"] = torch.tensor(self.tokens == "patch")
        if self.backbone.window is not None:
            fixed["window"] = self.backbone.window
        return state | {f"backbone.{key}": value for key, value in fixed.items()}

    def layers(self) -> list[list[str]]:
        """Names of the backbone's parameters in layers, from input to output; each name once.

        timm's grouping. CT-CLIP: patch embedding and spatial bias, each spatial layer, each temporal layer. Adapters
        are the last layer, so that `unfreeze_backbone(1)` trains these alone.
        """
        from timm.models import group_parameters

        body: Any = self.get_submodule(self.layered_module)
        matcher = body.group_matcher() if hasattr(body, "group_matcher") else {}
        if isinstance(matcher, dict):
            # What no pattern matches (a last norm; parts of timm's own classifier, unused here) joins the last layer.
            matcher = matcher | {"rest": [(".", (99999,))]}
        groups = group_parameters(body, matcher).values()
        layers = [[f"{self.layered_module}.{name}" for name in names if ".lora_" not in name] for names in groups]
        if adapters := [name for name, _ in self.named_parameters() if ".lora_" in name]:
            layers.append(adapters)
        if "to_visual_latent" in self.backbone_modules:
            layers[-1].append("to_visual_latent.weight")
        return layers

    def parameter_groups(
        self,
        head_lr: float | None = None,
        backbone_lr: float = 3e-5,
        layer_decay: float = 0.8,
        weight_decay: float = 0.01,
        adapter_lr: float = 5e-4,
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer of your own, such as torch.optim.AdamW: the head, then the backbone's layers from the
        output to the input. All are in it from the start, so that one optimizer serves before and after
        `unfreeze_backbone()`: frozen parameters have no gradient, and AdamW leaves those alone. Each group has its
        `layer`: 0 is the head, 1 the backbone's last.

        Args:
            head_lr: default: 0.03 for CT-CLIP, whose latent has length 1, so that its weights have far to go; 0.001 for
                the others.
            backbone_lr: rate of the layer nearest to the output; each layer below has `layer_decay` times the rate of
                the one above.
            adapter_lr: rate of adapters (`add_lora`), which are layer 1; the backbone's own layers follow.
            weight_decay: of matrices; vectors (biases, norms, scales) get none.
        """
        if head_lr is None:
            head_lr = HEAD_LEARNING_RATE["ctclip" if self.is_ctclip else "others"]
        parameters = dict(self.named_parameters())
        head = [name for name in parameters if name.startswith(HEAD_PREFIXES)]
        rates = [(head, head_lr)]
        layers = self.layers()
        if self.adapters():
            rates.append((layers.pop(), adapter_lr))
        rates += [(names, backbone_lr * layer_decay**below) for below, names in enumerate(reversed(layers))]
        groups = []
        for layer, (names, rate) in enumerate(rates):
            for decay, is_matrix in ((weight_decay, True), (0.0, False)):
                chosen = [parameters[name] for name in names if (parameters[name].ndim > 1) == is_matrix]
                group = {"params": chosen, "lr": rate, "weight_decay": decay, "layer": layer}
                groups += [group] if chosen else []
        return groups

    # -- timm's conventions, so that its optimizers and scripts work ---------------------------------------------------

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def num_features(self) -> int:
        """Width of what the classifier takes: of a latent, of a token (head "attention"), or of pooled features."""
        if self.sizes is None:
            return self.backbone.dim
        return self.sizes.dim if self.head_name == "attention" else self.sizes.latent

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int | None = None, *, labels: Sequence[str] | None = None) -> None:
        """A new head of the same kind, its logits exactly 0. Make the optimizer after it, not before.

        labels: names of the logits, in order. Without them `labels` stays where `num_classes` is its number, and is
        "class 0", "class 1", ... for another number. Raises ValueError where names and number differ, and for none.
        """
        expected = "expected a list of different names, one for each class"
        listed = isinstance(labels, (list, tuple, type(None)))
        if not listed or any(not isinstance(name, str) or not name for name in labels or ()):
            raise ValueError(f"found labels {labels!r}, {expected}")
        if num_classes is not None and type(num_classes) is not int:
            raise ValueError(f"found {num_classes!r} classes, expected a whole number")
        names = self.labels if labels is None else tuple(labels)
        if labels is None and num_classes not in (None, len(names)):
            names = tuple(f"class {i}" for i in range(num_classes or 0))
        if num_classes not in (None, len(names)) or len(set(names)) != len(names):
            number = "" if num_classes is None else f" for {num_classes} classes"
            raise ValueError(f"found labels {names!r}{number}, {expected}")
        if not names:
            raise ValueError("found no class, expected at least one; features without a head are features(x)")
        old = next(self.classifier.parameters())
        self.classifier = self._new_head(len(names)).to(old.device, old.dtype).train(self.training)
        self.labels = names
        self._hub_mixin_config["labels"] = list(names)
        if self.load_report is not None:
            self.load_report = replace(self.load_report, head=f"{self.head_name}, new")

    @torch.no_grad()
    def select_labels(self, labels: Sequence[str]) -> list[str]:
        """The head for these labels, in their order: as it is for those that the model has, its logits exactly 0 for
        the others, which are returned. Make the optimizer after it. A prompt head has those of its prompts only."""
        old, had, report = self.classifier.state_dict(), list(self.labels), self.load_report
        new = [name for name in labels if name not in had]
        if new and self.head_name == "prompts":
            raise ValueError(f"found no prompt for {', '.join(new)}, expected labels of the prompts; make the head of "
                             "Prompts.from_names(labels)")
        self.reset_classifier(labels=labels)
        rows = [(i, had.index(name)) for i, name in enumerate(labels) if name in had]
        for name, value in self.classifier.state_dict().items():
            if name.startswith("hidden."):  # of all labels together
                value.copy_(old[name])
            else:
                for i, j in rows:
                    value[i] = old[name][j]
        if report is not None and rows and not report.head.endswith("new"):
            self.load_report = replace(report, head=f"{report.head}: {len(rows)} of {len(labels)} labels")
        return new

    def forward_features(self, x: Tensor) -> Tensor:
        """`features`."""
        return self.features(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """`head`; with `pre_logits` what the classifier takes."""
        if pre_logits:
            return features if self.is_ctclip else self._pooled(features)
        return self.head(features)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """`set_gradient_checkpointing`."""
        self.set_gradient_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """For timm.optim.param_groups_layer_decay: name of a parameter -> its layer, from input to output; the head is
        the last. `coarse`: the backbone is one layer."""
        layers = self.layers()
        numbers = {name: 0 if coarse else number for number, names in enumerate(layers) for name in names}
        return lambda name: numbers.get(name, len(layers))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm gives no weight decay, beside vectors: a transformer's position embeddings."""
        body: Any = self.get_submodule(self.layered_module)
        names = body.no_weight_decay() if hasattr(body, "no_weight_decay") else ()  # some of parts that it has not
        return {f"{self.layered_module}.{name}" for name in names} & {name for name, _ in self.named_parameters()}

    def to(self, *args: Any, **options: Any) -> CTCLIPMultiAbnormalityModel:
        """As usual; a memory format such as torch.channels_last reaches the parameters that have its number of axes."""
        memory_format = options.pop("memory_format", None)
        if args or options:
            super().to(*args, **options)
        if memory_format is not None:
            axes = 5 if memory_format == torch.channels_last_3d else 4
            for parameter in self.parameters():
                if parameter.ndim == axes:
                    parameter.data = parameter.data.to(memory_format=memory_format)
        return self

    # -- freezing ------------------------------------------------------------------------------------------------------

    def freeze_backbone(self) -> None:
        """No gradients, and evaluation mode even under `train()`: no tensor of the backbone changes."""
        self._unfreeze_only(set())

    def unfreeze_backbone(self, layers: int | None = None) -> None:
        """Gradients for the backbone, through the quantiser straight-through; the codebook stays fixed.

        Args:
            layers: number of `layers()` to unfreeze, counted from the output; the others are frozen, and the backward
                pass ends above them. None, or more than there are: all.
        """
        if layers is not None and layers < 1:
            raise ValueError(f"layers is {layers}, expected at least 1, or None for all; to freeze: freeze_backbone()")
        chosen = self.layers() if layers is None else self.layers()[-layers:]
        self._unfreeze_only({name for layer in chosen for name in layer})

    def _unfreeze_only(self, names: set[str]) -> None:
        backbone = {id(parameter) for parameter in self.backbone_parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in backbone:
                parameter.requires_grad_(name in names)
        self.train(self.training)

    def train(self, mode: bool = True) -> CTCLIPMultiAbnormalityModel:
        """As usual, but frozen parts of the backbone stay in evaluation mode, so that neither batch statistics nor drop
        path change them; so does all batch normalisation of a slice backbone that came with weights: its statistics are
        of many pictures, those of a step of the slices of a few volumes, with which the head's answers are others."""
        super().train(mode)
        if mode:
            keeps_statistics = not self.is_ctclip and not self.is_video and self.derived_from is not None
            for module in (part for name in self.backbone_modules for part in self.get_submodule(name).modules()):
                parameters = list(module.parameters())
                frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
                if frozen or (keeps_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                    module.eval()
        return self

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add_lora(
        self, rank: int = 8, alpha: float = 16.0, dropout: float = 0.1, targets: Sequence[str] = LORA_TARGETS
    ) -> None:
        """Adapters (LoRALinear) on a slice backbone's layers whose names end in `targets`; trained are these and the
        head, everything else is frozen. Outputs are the same until they are trained; a saved model has them merged.

        Raises ValueError where a target names no linear layer or convolution, as in convolutional networks, or the
        backbone does not call such a layer (BEiT reads the weights of its own), and for CT-CLIP.
        """
        if self.is_ctclip:
            raise ValueError("LoRA is for slice backbones (ctclip_path=None), not for CT-CLIP; use unfreeze_backbone()")
        if self.is_video:
            raise ValueError("LoRA is for vision transformers, not for video ResNets; use unfreeze_backbone()")
        if self.adapters():
            raise ValueError("found adapters already, expected none; merge_lora() merges them into the weights")
        net, name = self.backbone.net, self._hub_mixin_config["backbone"]
        layers = {
            place: layer for place, layer in net.named_modules()
            if type(layer) in ADAPTED and getattr(layer, "groups", 1) == 1
            and f".{place}".endswith(tuple(f".{target}" for target in targets))
        }  # fmt: skip
        missing = [target for target in targets if not any(f".{place}".endswith(f".{target}") for place in layers)]
        if missing or not layers:
            expected = "expected a vision transformer's; name others (--lora-targets, targets=), or unfreeze layers"
            raise ValueError(f"found no layer {' and no '.join(missing)} in '{name}', {expected}")
        called: set[str] = set()
        for place, layer in layers.items():
            adapter = ADAPTED[type(layer)](layer, rank, alpha, dropout).train(layer.training)
            adapter.register_forward_hook(lambda *_, place=place: called.add(place))
            net.set_submodule(place, adapter)
        _forward_on_meta(self.backbone, (3, *self.input_shape[1:]))
        for place in layers:
            net.get_submodule(place)._forward_hooks.clear()
        if idle := [place for place in layers if place not in called]:
            self.merge_lora()
            raise ValueError(f"'{name}' does not call {_first_five(idle)}, expected layers that it calls; name others "
                             "(--lora-targets, targets=), or unfreeze layers")  # fmt: skip
        self.unfreeze_backbone(1)

    def adapters(self) -> dict[str, Any]:
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, (LoRALinear, LoRAConv2d))}

    def merge_lora(self) -> None:
        """Adds the adapters to the weights that they change and removes them; outputs are equal but for rounding."""
        for name, layer in self.adapters().items():
            self.set_submodule(name, layer.merged())

    def merged_state(self) -> dict[str, Tensor]:
        """`state_dict` as after `merge_lora`."""
        state: dict[str, Tensor] = self.state_dict()
        for name, layer in self.adapters().items():
            state[f"{name}.weight"] = merged_weight(layer)
            del state[f"{name}.lora_a"], state[f"{name}.lora_b"]
        return state

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Unfrozen training in less memory: activations inside a layer are recomputed in the backward pass, which takes
        a third more time.

        Gradients are the same. Running batch statistics, where there are any, are updated twice per step.
        Raises ValueError for a slice backbone that has no such mode.
        """
        if self.is_ctclip:
            self.visual_transformer.checkpointing = enabled
            return
        if self.is_video:
            self.backbone.checkpointing = enabled
            return
        try:
            self.backbone.net.set_grad_checkpointing(enabled)
        except (AttributeError, AssertionError) as error:  # timm's answer for models without
            name = self._hub_mixin_config["backbone"]
            raise ValueError(f"'{name}' has no gradient checkpointing; leave it off or lower the batch size") from error

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Volume (B, 1, D, H, W) or three adjacent axial slices (B, 3, H, W), HU / 1000 in [-1, 1] -> logits (B, 18);
        with prompts for n findings (B, n), columns as in `labels`. A video ResNet takes volumes only.

        In-plane axes are x then y, as `preprocess_volume` gives them: the transpose of the usual image.
        """
        logits = self.head(self.features(x))
        self.scale_check(x)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """The head's input; constant for a frozen backbone, so it is computed once per volume.

        CT-CLIP: latents (B, L); with head "attention" code ids (B, T, h, w) int64, or quantised tokens (B, T, h, w, C)
        where a gradient reaches them. Slice variant: pooled (B, C), with head "attention" tokens (B, S, h, w, C), with
        cbam maps (B, S, C, h, w). Video ResNet: pooled (B, C), over its crop or crops.
        """
        if self.is_video:
            return torch.stack([self.backbone(crop).mean((2, 3, 4)) for crop in self.crops(x)]).mean(0)
        if not self.is_ctclip:
            return self._slice_features(x)
        if self.head_name != "attention":
            return self.encode(x)
        tokens, quantizer = self.visual_transformer(self._as_volume(x)), self.visual_transformer.vq
        return quantizer(tokens) if tokens.requires_grad else quantizer.code_ids(tokens)

    def crops(self, x: Tensor) -> list[Tensor]:
        """Of a video ResNet's volume (B, 1, D, H, W): what passes through it; a crop as it is."""
        if not self._is_volume(x):
            raise ValueError(f"input of shape {tuple(x.shape)}; a video ResNet takes volumes (B, 1, D, H, W): "
                             "preprocess_volume(path, shape=model.input_shape)")  # fmt: skip
        starts = crop_starts(x.shape[2:], self.crop_shape, 1 if self.training else self.test_crops)
        d, h, w = self.crop_shape
        return [x[:, :, i : i + d, j : j + h, k : k + w] for i, j, k in starts]

    def _slice_features(self, x: Tensor) -> Tensor:
        chosen = None
        if self._is_volume(x) and self.training and self.train_slices:
            chosen = random_slices(len(x), self.n_slices, self.train_slices)
        slices = slice_triplets(x, self.n_slices, chosen) if self._is_volume(x) else x[:, None]  # (B, S, 3, H, W)
        flat, by_volume, of_tokens = slices.flatten(0, 1), slices.shape[:2], self.cache_format == "tokens"
        encode = partial(self.backbone.tokens, kind=self.tokens) if of_tokens else self.backbone
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()  # nor exporting
        parts = [flat] if whole else flat.split(slices_at_once(x.device))
        found = torch.cat([encode(part) for part in parts]).unflatten(0, by_volume)
        return _pool(found) if self.cache_format == "pooled" else found  # (B, S, h, w, C) or (B, S, C, h, w)

    def features_of_maps(self, maps: Tensor) -> Tensor:
        """Slice variant: the backbone's maps (B, S, C, h, w) -> `features` of the volumes, but for class tokens."""
        if self.cache_format == "pooled":
            return _pool(maps)
        return as_tokens(maps, self.tokens) if self.cache_format == "tokens" else maps

    def head(self, features: Tensor) -> Tensor:
        """Output of `features`, or of `features_from_cache`, -> logits (B, 18), with prompts (B, n)."""
        if self.head_name in ("attention", "max"):
            codebook = self.codebook if self.is_ctclip else None
            return self.classifier(features if self.is_ctclip else self._pooled(features), codebook)
        if self.is_ctclip:
            # ClassFine applies a ReLU; prompts compare signed latents.
            features = features if self.head_name == "prompts" else features.relu()
            return self.classifier(self.dropout(features))
        return self.classifier(self.dropout(self._pooled(features)))

    def _pooled(self, features: Tensor) -> Tensor:
        """Slice variant: what the classifier takes, (B, C) or tokens; of the feature maps too that cbam takes."""
        if self.cache_format != "maps":
            return features
        maps = self.attention(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return _pool(maps) if self.head_name == "linear" else as_tokens(maps, self.tokens)

    @torch.no_grad()
    def encode_for_cache(self, x: Tensor) -> Tensor:
        """The smallest exact substitute for a volume while the backbone does not change: what a cache stores.

        CT-CLIP: code ids (B, T, h, w) int64. Slice variant: `features`. Needs evaluation mode or a frozen backbone:
        batch statistics and drop path of a training backbone change the result at every pass.
        """
        return self.code_ids(x) if self.is_ctclip else self.features(x)

    def features_from_cache(self, stored: Tensor) -> Tensor:
        """Output of `encode_for_cache`, codes in any integer type -> the head's input: `features` of the volume."""
        if not self.is_ctclip:
            return stored
        codes = stored.int()  # torch cannot index with uint16, which is what codes are stored in
        if self.head_name == "attention":
            return codes
        return torch.cat([self._latents(chunk) for chunk in codes.split(LATENTS_AT_ONCE)])

    def _latents(self, codes: Tensor) -> Tensor:
        """(B, T, h, w) -> (B, L), L2-normalised: `project(lookup(codes))` without the (B, T, h, w, C) in between."""
        B, T, h, w = codes.shape
        columns = codes.movedim(1, -1).reshape(B * h * w, T)
        means = F.embedding_bag(columns, self.codebook, mode="mean")  # (B*h*w, C)
        return F.normalize(self.to_visual_latent(means.view(B, -1)), dim=-1)

    @property
    def codebook(self) -> Tensor:
        """(codes, C), as stored. CT-CLIP variants only."""
        return self.visual_transformer.vq._codebook.embed[0]

    def encode(self, x: Tensor) -> Tensor:
        """Volume or slices -> latents (B, L), L2-normalised. CT-CLIP variants only."""
        volume = self._as_volume(x)
        return self.project(self.visual_transformer.vq(self.visual_transformer(volume)))

    def project(self, tokens: Tensor) -> Tensor:
        """Quantised tokens (B, T, h, w, C) -> latents (B, L), L2-normalised."""
        latents = self.to_visual_latent(tokens.mean(1).flatten(1))  # h, w, C order
        return F.normalize(latents, dim=-1)

    def code_ids(self, x: Tensor) -> Tensor:
        """Volume or slices -> codebook row of every token (B, T, h, w), int64. CT-CLIP variants only."""
        volume = self._as_volume(x)
        return self.visual_transformer.vq.code_ids(self.visual_transformer(volume))

    def _as_volume(self, x: Tensor) -> Tensor:
        """Checks a CT-CLIP input; three adjacent slices become one temporal patch at the tower's in-plane size."""
        if self.sizes is None:
            raise TypeError("a slice backbone has no CT-CLIP latents or codes; use features(), or pass ctclip_path")
        depth, height, width = self.sizes.temporal_patch, *self.input_shape[1:]
        if not self._is_volume(x):
            return F.interpolate(x[:, None], (depth, height, width), mode="trilinear")
        if x.shape[2] % depth or x.shape[2] == 0 or x.shape[3:] != (height, width):
            raise ValueError(
                f"volume of shape {tuple(x.shape)}; this checkpoint takes (B, 1, D, {height}, {width}) with D a "
                f"multiple of {depth}: preprocess_volume(path, shape=model.input_shape)"
            )
        return x

    @staticmethod
    def _is_volume(x: Tensor) -> bool:
        """True for (B, 1, D, H, W), False for three slices (B, 3, H, W); raises ValueError for any other shape and
        TypeError for whole numbers."""
        if (x.ndim, *x.shape[1:2]) not in ((5, 1), (4, 3)):
            raise ValueError(
                f"input of shape {tuple(x.shape)}; expected a volume (B, 1, D, H, W) or three slices (B, 3, H, W)"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"input of type {str(x.dtype).removeprefix('torch.')}, expected floating point, HU / 1000 in [-1, 1]: "
                "take ctclip.data.slices(path) or preprocess_volume(path), or of HU x.clamp(-1000, 1000) / 1000"
            )
        return x.ndim == 5

    # -- saving --------------------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        """model.safetensors and config.json, each written under a temporary name, then renamed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / SAVED_WEIGHTS) as path:
            tensors = {key: value.detach().contiguous() for key, value in self.merged_state().items()}
            save_file(tensors, path, metadata={"format": "pt"})
        with _replacing(folder / "config.json") as path:
            path.write_text(json.dumps(self._hub_mixin_config | {"derived_from": self.derived_from}, indent=2))

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,  # of the mixin's push_to_hub
    ) -> str | None:
        """The mixin's, without a model card: model.safetensors and config.json in `save_directory`.

        Raises ModelError where the folder holds other weights and files that may describe them, such as a run's, or
        either file is another program's.
        """
        folder = Path(save_directory)
        weights = folder / SAVED_WEIGHTS
        if foreign := next((path for path in (folder / "config.json", weights) if path.exists()), None):
            try:
                saved_config(folder)
            except CheckpointError as error:
                found = f"{foreign}: found a file that no saved model of ours goes with"
                raise ModelError(f"{found}, expected no such file; choose another folder") from error
        if weights.is_file() and not has_tensors_of(self, weights):
            own = {weights.name, "config.json", "README.md", WRITTEN}
            others = sorted(path.name for path in folder.iterdir() if path.name not in own and path.name[0] != ".")
            if others:
                raise ModelError(
                    f"{folder}: found other weights and files that may describe them ({', '.join(others[:3])}), "
                    "expected a folder with neither; choose another folder"
                )
        is_listed = (folder / WRITTEN).is_file()  # as in a run
        with listing(folder, weights.name, "config.json") if is_listed else nullcontext():
            self._save_pretrained(folder)
        return self.push_to_hub(repo_id or folder.name, **options) if push_to_hub else None

    @staticmethod
    def _check_sizes(sizes: TowerSizes, state: dict[str, Tensor]) -> None:
        """Raises ValueError where the weights have others."""
        said = asdict(sizes)
        if not all(type(size) is int and size > 0 for size in said.values()):
            raise ValueError("sizes that are no whole numbers above 0")
        try:
            found = asdict(TowerSizes.from_state_dict(state, sizes.patch))
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        if differ := [f"{key} {said[key]} where they have {size}" for key, size in found.items() if said[key] != size]:
            raise ValueError(", ".join(differ))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str = "cpu", **options: Any
    ) -> CTCLIPMultiAbnormalityModel:
        """A saved model in evaluation mode, from a folder, or from the hub with the small files beside the weights.

        `options`: HUB_OPTIONS, which a folder does not need; others are the constructor's, in place of config.json's.
        Raises CheckpointError where the folder's files are absent, damaged or do not fit each other.
        """
        name, folder = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        hub = {option: options.pop(option) for option in HUB_OPTIONS if option in options}
        if not folder.is_dir():
            if folder.is_file() or folder.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
                found = "a weights file" if folder.is_file() else "the name of a weights file"
                raise CheckpointError(
                    f"{name}: found {found}, expected a saved model's folder or its name on the hub; a CT-CLIP file is "
                    f"loaded by CTCLIPMultiAbnormalityModel(ctclip_path={name!r})"
                )
            if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
                raise CheckpointError(f"{name}: found no such folder, expected a saved model's folder, or USER/NAME of "
                                      "one on the hub; check the path")  # fmt: skip
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, allow_patterns=["model.safetensors", "*.json", "*.md"], **hub))
        weights = folder / SAVED_WEIGHTS
        if not weights.is_file():
            check_no_other_folder(folder)
            raise CheckpointError(f"{name}: found no model.safetensors, expected a saved model, not a pickle")
        config = saved_config(folder)
        arguments = {key: config[key] for key in inspect.signature(cls.__init__).parameters if key in config}
        arguments |= {"pretrained": False} | options  # everything comes from the folder
        names = None if arguments.get("head") == "prompts" else arguments.pop("labels", None)
        state = read_tensors(weights)
        check_written(weights)
        try:
            if arguments.get("sizes") is not None:  # before anything of these sizes is built
                cls._check_sizes(TowerSizes(**arguments["sizes"]), state)
            with torch.device("meta") if arguments.get("sizes") else nullcontext():
                model = cls(**arguments)
                if names is not None and tuple(names) != model.labels:
                    model.reset_classifier(labels=names)
            own = model.state_dict()
            for key in sorted(state.keys() & own.keys()):
                if misfit := _misfit(state[key], own[key]):
                    raise ValueError(f"{key} {misfit}")
            if model.is_ctclip:
                model.load_state_dict({key: value.to("meta") for key, value in state.items()})  # refuses what is no fit
                read = partial(read_tensors, weights) if _can_be_mapped(weights) else partial(dict, state)
                state = _in_memory(read, own, weights)
            check_finite({} if model.is_ctclip else state, weights)
            model.load_state_dict(state, assign=model.is_ctclip)
        except (PretrainedWeightsError, CheckpointError):
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:200] or type(error).__name__
            raise MisfitError(
                f"{name}/config.json: found what does not fit model.safetensors ({reason}), expected the two files of "
                "one saved model; copy both again"
            ) from error
        model.folder, origin = folder, config.get("derived_from")
        model.derived_from = origin if origin in (None, "imagenet", "kinetics400") else published_name(str(origin))
        return model.to(map_location).eval()


def has_tensors_of(model: CTCLIPMultiAbnormalityModel, file: Path) -> bool:
    """Whether a .safetensors file holds the model's tensors, to the bit."""
    state = model.merged_state()
    try:
        with safe_open(file, framework="pt") as saved:
            return set(saved.keys()) == set(state) and all(
                torch.equal(value.detach().cpu(), saved.get_tensor(key)) for key, value in state.items()
            )
    except (OSError, SafetensorError):
        return False


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renamed to `path` when the block ends well, removed when it does not."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- Losses ------------------------------------------------------------------------------------------------------------


MOST_GAMMA = 100  # 2^(gamma + 1) times a logit of 100 is still a float32


def _mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Mean of what is known; 0, with gradients of 0, where nothing is."""
    return torch.where(known, values, 0).sum() / known.sum().clamp(min=1)


class KnownLabelsLoss(nn.Module):
    """The mean of an element-wise loss (its `reduction` "none") over the labels that are not UNKNOWN (-1)."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _mean_of_known(self.loss(logits, labels.clamp(min=0)), labels != UNKNOWN)


class AggressiveFocalLoss(nn.Module):
    """Focal loss whose `alpha` weighs the *negatives*: raising it pushes predictions down (fewer positives).

    Per element, with p = sigmoid(logit) and label y in {0, 1}:
    2^(gamma + 1) * [(1 - alpha) * y * (1 - p)^gamma * -log p + alpha * (1 - y) * p^gamma * -log(1 - p)]; then the mean.
    Elements whose label is UNKNOWN (-1) are left out of it.
    The factor makes an undecided model on balanced labels score ln 2 = 0.6931 whatever alpha and gamma.

    Args:
        alpha: in (0, 1). At 0.5 an unsure case (probability one half) gets a logit of 0; above, the logit goes down.
        gamma: 0 to MOST_GAMMA; higher values reduce the loss of easy cases. 0 is a weighted cross-entropy.
        weight: (18,) or any shape that broadcasts to the labels; multiplies their losses, as in nn.BCEWithLogitsLoss.
    """

    weight: Tensor | None

    def __init__(self, alpha: float = 0.85, gamma: float = 4.0, weight: Tensor | None = None):
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is {alpha}, expected a number between 0 and 1 (it weighs the negatives)")
        if not 0 <= gamma <= MOST_GAMMA:
            raise ValueError(f"gamma is {gamma}, expected 0 to {MOST_GAMMA}")
        self.alpha, self.gamma = alpha, gamma
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits and labels of the same shape -> scalar, float32. Computed in float32 through log-sigmoids, so that
        logits of +-100 in half precision give finite values and gradients."""
        if logits.shape != labels.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} differ in shape")
        with torch.autocast(logits.device.type, enabled=False):
            known, logits, labels = labels != UNKNOWN, logits.float(), labels.float()
            log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
            positive = (1 - self.alpha) * labels * torch.exp(self.gamma * log_not_p) * -log_p
            negative = self.alpha * (1 - labels) * torch.exp(self.gamma * log_p) * -log_not_p
            loss = positive + negative if self.weight is None else (positive + negative) * self.weight
            return 2.0 ** (self.gamma + 1) * _mean_of_known(loss, known)


def create_balanced_loss(alpha: float = 0.85, gamma: float = 4.0) -> AggressiveFocalLoss:
    """The loss against over-prediction; see AggressiveFocalLoss for which way each number pushes."""
    return AggressiveFocalLoss(alpha, gamma)


def create_loss(
    kind: str = "focal", alpha: float = 0.85, gamma: float = 4.0, label_weights: Tensor | None = None
) -> nn.Module:
    """The loss that `kind` names, a mean over volumes and labels but UNKNOWN (-1) ones. Move it to the logits' device.

    Args:
        kind: "focal" (AggressiveFocalLoss with `alpha` and `gamma`), "bce" (cross-entropy: probabilities that fit the
            label rate) or "asl" (timm's asymmetric loss with its own constants: ranks well, probabilities too high).
        label_weights: (18,), multiplies the loss of each label, positives and negatives alike.
    """
    if kind == "focal":
        return AggressiveFocalLoss(alpha, gamma, label_weights)
    if kind == "bce":
        return KnownLabelsLoss(nn.BCEWithLogitsLoss(weight=label_weights, reduction="none"))
    if kind != "asl":
        raise ValueError(f"loss '{kind}' is not known; expected focal, bce or asl")
    from timm.loss import AsymmetricLossMultiLabel

    return KnownLabelsLoss(AsymmetricLossMultiLabel(reduction="none", weight=label_weights))


def balanced_label_weights(labels: Tensor) -> Tensor:
    """Weights for `create_loss` from the training labels (n, L): inverse frequency of each label's rarer class.

    At most ten times the smallest, and 1 on average; a label with only one class gets the smallest. Positives and
    negatives of a label have the same weight: unlike a weight on positives, this moves no probability up or down.
    """
    known = (labels != UNKNOWN).sum(0).clamp(min=1)
    rate = (labels == 1).sum(0) / known
    rarer = torch.minimum(rate, 1 - rate)
    weights = 1 / torch.where(rarer > 0, rarer, rarer.max()).clamp(min=1 / len(labels))
    weights = weights.clamp(max=10 * weights.min())
    return weights / weights.mean()


# -- Script: "Test the Model" ------------------------------------------------------------------------------------------


def published_layout(model: CTCLIPMultiAbnormalityModel, classifier: bool) -> dict[str, Tensor]:
    """State dict of a CT-CLIP variant under the published keys, from which all sizes can be read again.

    Only `to_patch_emb_first_frame`, which is not used in the forward pass, tells the in-plane patch: zeros suffice.
    """
    assert model.sizes is not None
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier.")}
    state[FIRST_FRAME] = torch.zeros(model.sizes.patch**2)
    if not classifier:
        return state
    head = {f"classifier.{key}": value for key, value in model.classifier.state_dict().items()}
    return {f"trained_model.{key}": value for key, value in state.items()} | head


def describe(title: str, model: CTCLIPMultiAbnormalityModel, x: Tensor) -> None:
    """Prints the shapes, the loss test and the parameter counts of one variant."""
    with torch.inference_mode():
        logits = model.eval()(x)
    labels = torch.zeros_like(logits)
    labels[:, ::2] = 1  # nine of eighteen
    note = "trained head; an untrained one gives 0.6931" if logits.any() else "untrained head on balanced labels"
    backbone, head = (sum(p.numel() for p in part) for part in (model.backbone_parameters(), model.head_parameters()))
    print(f"\n{title}")
    if model.load_report and x.dim() == 5:  # said once
        print(f"  Weights:      {model.load_report!r}")
    print(f"  Input shape:  {tuple(x.shape)}")
    print(f"  Output shape: {tuple(logits.shape)}")
    print(f"  Loss test: {create_balanced_loss()(logits, labels).item():.4f}  ({note})")
    print(f"  Parameters:   backbone {backbone:,}, head {head:,}, total {backbone + head:,}")


FILES = {name: f"models/ctclip_{name}.pt" for name in ("classfine", "vocabfine", "zeroshot")}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def main(argv: list[str] | None = None) -> int:
    description = "Test the model: every variant that is present runs one input."
    parser = _OneLineParser(description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ctclip {__version__}")
    kinds = f"timm model, or a video ResNet ({', '.join(VIDEO_MODELS)})"
    parser.add_argument("--backbone", default="efficientnet_b0", help=kinds)
    no_weights = ("--no-pretrained", "--no_pretrained")
    parser.add_argument(*no_weights, action="store_true", help="slice variant from random weights")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print("Testing the models (random input; the numbers say that the code runs, nothing about patients)")
    try:
        missing = {name: try_weights(name, path) for name, path in (FILES | {"demo": DEMO_PATH}).items()}
        missing[args.backbone] = try_backbone(args.backbone, not args.no_pretrained)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    working = [name for name, reason in missing.items() if not reason]
    verb = "is here and works" if len(working) == 1 else "are here and work"
    print(f"\n{len(working)} of {len(missing)} variants {verb}{': ' if working else ''}{', '.join(working)}")
    width = max(map(len, missing)) + 2
    print("".join(f"  {name:<{width}}{reason}\n" for name, reason in missing.items() if reason), end="")
    training = _HERE / "ctclip_training.py"
    if "demo" in working and training.is_file():
        print(f"Next: python {training.name if Path.cwd() == _HERE else training} --mode quick_test")
    return 0


def try_weights(name: str, path: str) -> str:
    """Runs a CT-CLIP file on a volume and on slices; -> why it does not work, "" if it does."""
    try:
        model = CTCLIPMultiAbnormalityModel(path)
        describe(f"CT-CLIP {name}, volume", model, torch.rand(1, 1, *model.input_shape) * 2 - 1)
        describe(f"CT-CLIP {name}, three adjacent slices", model, torch.rand(2, 3, 224, 224) * 2 - 1)
    except FileNotFoundError:
        fetched = "it comes with the project" if name == "demo" else f"python ctclip_setup.py --model {name} fetches it"
        return f"not here (no file {path}); {fetched}"
    except CheckpointError as error:
        return f"cannot be used: {error}"
    if name in FILES and model.load_report and model.load_report.no_prompts_reason:  # the demo has no text tower
        print(f"  No prompts:   {model.load_report.no_prompts_reason}")
    return ""


def try_backbone(name: str, pretrained: bool) -> str:
    """Runs a slice backbone of timm or a video ResNet; -> why it does not work, "" if it does."""
    try:
        model = CTCLIPMultiAbnormalityModel(None, backbone=name, pretrained=pretrained)
    except PretrainedWeightsError as error:
        cause = _first_sentence(error.__cause__ or error)
        which = "Kinetics" if name in VIDEO_MODELS else "ImageNet"
        return f"{which} weights not here ({cause}); --no-pretrained tests it without"
    if model.is_video:
        describe(f"Video ResNet {name}, a small crop", model, torch.rand(1, 1, 32, 64, 64) * 2 - 1)
    else:
        describe(f"Slice variant {name}", model, torch.rand(2, 3, 224, 224) * 2 - 1)
    return ""


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            code: object = main()
        except SystemExit as end:  # after --help
            code = end.code
        sys.stdout.flush()
    except BrokenPipeError:  # `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)  # type: ignore[arg-type]

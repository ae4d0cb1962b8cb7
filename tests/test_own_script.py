"""The model in other people's code: a 2-D training script with model and loss replaced as the guide says, the guide's
own snippet, inputs of a wrong scale, and timm's conventions, by timm's own functions."""

import inspect
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ctclip_model
from ctclip.config import HEAD_LEARNING_RATE, TrainingConfig
from ctclip.data import LabelledVolumes, slices
from ctclip_evaluation import load_labels, load_predictions
from ctclip_model import (
    CTCLIPMultiAbnormalityModel,
    ScaleCheck,
    create_balanced_loss,
)

ROOT = Path(__file__).resolve().parent.parent
CLIP = str(ROOT / "tests" / "fixtures" / "tiny_a_clip.pt")


def build(variant: str, **options: object) -> CTCLIPMultiAbnormalityModel:
    torch.manual_seed(7)
    if variant in ("linear", "mlp", "attention", "prompts"):
        return CTCLIPMultiAbnormalityModel(CLIP, head=None if variant == "prompts" else variant)
    return CTCLIPMultiAbnormalityModel(None, variant, pretrained=False, n_slices=2, **options)


def image(seed: int = 0) -> torch.Tensor:
    """Four slice triplets in [-1, 1] with air."""
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) - 0.7
    x[..., :8] = -1
    return x


def train(model, optimizer, steps: int = 3) -> None:
    labels = torch.eye(18)[:4, : model.num_classes]
    for step in range(steps):
        x = image(step)
        if model.is_ctclip:  # volumes: a slice is one token in depth, whose attention has no gradient
            x = nn.functional.interpolate(x.mean(1)[:, None, None], model.input_shape) * torch.rand(4, 1, 20, 1, 1)
        loss = create_balanced_loss(0.35, 2.0)(model.train()(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- the whole script --------------------------------------------------------------------------------------------------


class SliceDataset(torch.utils.data.Dataset):
    """The middle slice of every volume with its labels."""

    def __init__(self, cohort: LabelledVolumes):
        self.volumes = cohort.volumes

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, index):
        volume = self.volumes[index]
        return slices(volume.path, k=1)[0], torch.from_numpy(volume.labels)


def test_a_2d_script_with_model_and_loss_replaced_learns_and_keeps_the_positive_rate(phantoms, monkeypatch):
    """Two stages with one optimizer, built before the first: the head alone, then everything."""
    monkeypatch.setattr(ScaleCheck, "warned", False)
    torch.manual_seed(0)
    table = next(phantoms.rglob("*train*labels*.csv"))
    cohort = LabelledVolumes(table, phantoms / "dataset" / "train_fixed")
    cohort.volumes = cohort.volumes[:12]
    x, y = map(torch.stack, zip(*SliceDataset(cohort), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)

    model = CTCLIPMultiAbnormalityModel(ctclip_path=CLIP)  # was: timm.create_model("efficientnet_b0", num_classes=18)
    criterion = create_balanced_loss(alpha=0.35, gamma=2.0)  # was: nn.BCEWithLogitsLoss(pos_weight=...)
    optimizer = torch.optim.AdamW(model.parameter_groups())  # was: torch.optim.AdamW(model.parameters(), lr=1e-3)

    def epoch() -> float:
        losses = []
        for batch, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model.train()(batch), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses))

    before = {name: value.clone() for name, value in model.named_parameters()}
    model.freeze_backbone()
    frozen = [epoch() for _ in range(4)]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    model.unfreeze_backbone()
    unfrozen = [epoch() for _ in range(2)]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    still = set(before) - moved  # a slice is one token in depth, whose attention has no gradient
    assert all(re.search(r"enc_temporal_transformer.*\.(q_scale|k_scale|gamma)$", name) for name in still)
    assert unfrozen[-1] < frozen[-1] < frozen[0]
    with torch.no_grad():
        rate = (model.eval()(x).sigmoid() >= 0.5).float().mean()
    assert 0 < rate < 0.5 and not ScaleCheck.warned


def test_the_guides_snippet_runs(monkeypatch, phantoms, tmp_path):
    """Every Python block of its section up to the evaluation, one after the other."""
    text = (ROOT / "CTCLIP_COLAB_README.md").read_text(encoding="utf-8")
    section = text.split("\n## Into your own script\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section.split("**Evaluate your predictions.**")[0], re.M | re.S)
    code = "\n".join(blocks)
    assert "parameter_groups(" in code and "create_balanced_loss(" in code and "slices(" in code
    monkeypatch.chdir(tmp_path)
    fixed = phantoms / "dataset" / "train_fixed"
    volume = next(fixed.rglob("*.nii.gz"))
    header, *rows = next(phantoms.rglob("*train*labels*.csv")).read_text().splitlines()
    here = {path.name for path in fixed.rglob("*.nii.gz")}
    table = tmp_path / "labels.csv"
    table.write_text("\n".join([header, *[row for row in rows if row.partition(",")[0] in here][:3]]))
    for written, here in (("scan.nii.gz", volume), ("labels.csv", table), ("scans/", fixed),
                          ("models/ctclip_classfine.pt", CLIP)):  # fmt: skip
        assert written in code
        code = code.replace(f'"{written}"', repr(str(here)))
    scope = {"labels": torch.zeros(8, 18)}
    exec(code, scope)
    predictions = load_predictions("mine.csv")
    assert list(predictions.columns) == list(scope["model"].labels) and len(predictions) == len(load_labels(table)) == 3
    assert not scope["model"].training and (tmp_path / "models" / "mine" / "model.safetensors").is_file()
    assert scope["logits"].shape[1] == 18 and scope["loss"].requires_grad
    rates = {group["layer"]: group["lr"] for group in scope["optimizer"].param_groups}
    assert rates[0] == HEAD_LEARNING_RATE["ctclip"] and rates[1] == TrainingConfig.backbone_learning_rate


# -- parameter groups --------------------------------------------------------------------------------------------------


def test_default_rates_are_those_of_the_scripts():
    defaults = inspect.signature(CTCLIPMultiAbnormalityModel.parameter_groups).parameters
    config = TrainingConfig()
    assert ctclip_model.HEAD_LEARNING_RATE == HEAD_LEARNING_RATE
    assert defaults["backbone_lr"].default == config.backbone_learning_rate
    assert defaults["layer_decay"].default == config.layer_decay
    assert defaults["weight_decay"].default == config.weight_decay
    for variant, kind in (("linear", "ctclip"), ("resnet10t", "others")):
        assert build(variant).parameter_groups()[0]["lr"] == HEAD_LEARNING_RATE[kind]


@pytest.mark.parametrize("variant", ["linear", "attention", "resnet10t"])
def test_one_optimizer_serves_before_and_after_unfreezing(variant):
    """Weight decay moves no frozen tensor; after unfreezing every layer moves, at its own rate."""
    model = build(variant)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 1e-3, weight_decay=0.5))
    model.freeze_backbone()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, optimizer)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, frozen[name])}
    assert moved and all(name.startswith("classifier.") for name in moved)
    model.unfreeze_backbone()
    train(model, optimizer)
    layers = {name for names in model.layers() for name in names}
    parameters = dict(model.named_parameters())
    assert layers and all(not torch.equal(parameters[name], frozen[name]) for name in layers)


# -- the scale of the input --------------------------------------------------------------------------------------------


def imagenet(x: torch.Tensor) -> torch.Tensor:
    return ((x + 1) / 2 - 0.45) / 0.225


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(ScaleCheck, "warned", False)


@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (imagenet, "values normalised by a mean and a deviation, such as ImageNet's"),
        (lambda x: x * 1000, "HU"),
        (lambda x: (x + 1) / 2, "pixel values from 0 to 1"),
        (lambda x: ((x + 1) / 2 * 255).round(), "pixel values from 0 to 255"),
        (lambda x: x * 1000 + 1024, "HU"),
    ],
)
def test_a_wrong_scale_is_said_once_with_the_remedy(change, kind, volume, unwarned):
    model = build("linear").eval()
    x = image()[:1, :1, None].expand(1, 1, 8, 64, 64).reshape(1, 1, 8, 64, 64) if volume else image()
    if volume:
        x = nn.functional.interpolate(x, model.input_shape, mode="nearest")
    with pytest.warns(UserWarning, match=re.escape(f"looks like {kind}; expected HU / 1000")) as caught:
        model(change(x))
    assert caught[0].filename == __file__ and "ctclip.data.slices(path)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("linear")(change(x))  # another model of the same process


def test_hu_by_1000_a_constant_and_an_empty_batch_are_not_warned_of(unwarned):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (image(), image().half().float(), torch.zeros(1, 3, 64, 64), image() * 1.2):
            build("resnet10t").eval()(x)
        ScaleCheck()(torch.zeros(0, 3, 64, 64))
        ScaleCheck()(torch.zeros(1, 3, 64, 64, device="meta"))


def test_only_the_first_batches_of_a_model_are_looked_at(unwarned):
    check, wrong = ScaleCheck(), image() * 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            check(image(seed))
        check(wrong)
    fresh = ScaleCheck()
    with pytest.warns(UserWarning, match="looks like HU"):
        fresh(wrong)


def test_a_compiled_or_exported_model_has_no_look_in_it(unwarned):
    model = build("resnet10t").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(image() * 1000)
        torch.export.export(model, (image() * 1000,))
    assert len(graphs) == 1 and not ScaleCheck.warned and model.scale_check.batches_left == 3


@pytest.mark.parametrize("variant", ["linear", "resnet10t"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_whole_numbers_are_one_sentence(variant, dtype):
    with pytest.raises(TypeError, match=f"input of type {str(dtype)[6:]}, expected floating point") as caught:
        build(variant)(torch.zeros(1, 3, 64, 64, dtype=dtype))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["linear", "resnet10t"])
@torch.no_grad()
def test_channels_last_gives_the_same_logits(variant):
    model = build(variant).eval()
    with torch.random.fork_rng():
        nn.init.normal_(model.classifier.weight)
    expected = model(image())
    assert model.to(memory_format=torch.channels_last) is model
    convolutions = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    assert bool(convolutions) == (variant == "resnet10t")
    found = model(image().to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.to(torch.float64).to("cpu", memory_format=torch.channels_last).classifier.weight.dtype == torch.float64


# -- timm's conventions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["linear", "attention", "resnet10t", "vit_tiny_patch16_224"])
def test_timms_layer_decay_sees_the_layers(variant):
    model = build(variant)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    layers = model.layers()
    for below, layer in enumerate(reversed(layers), 1):
        assert {scale[name] for name in layer} == {0.5**below}
    assert {value for name, value in scale.items() if name.startswith("classifier.")} == {1.0}
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == len(layers) + 1
    undecayed = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert model.no_weight_decay() <= undecayed
    assert bool(model.no_weight_decay()) == (variant == "vit_tiny_patch16_224")
    coarse = model.group_matcher(coarse=True)
    assert {coarse(name) for layer in layers for name in layer} == {0} and coarse("classifier.weight") > 0


@pytest.mark.parametrize("variant", ["linear", "attention", "resnet10t", "cbam"])
@torch.no_grad()
def test_features_and_head_make_the_logits(variant):
    model = (build("resnet10t", attention="cbam") if variant == "cbam" else build(variant)).eval()
    with torch.random.fork_rng():
        for parameter in model.head_parameters():
            parameter.add_(torch.randn_like(parameter))
    features = model.forward_features(image())
    assert torch.equal(model.forward_head(features), model(image()))
    assert model.num_classes == 18 and model.get_classifier() is model.classifier
    if variant in ("resnet10t", "cbam"):
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (4, model.num_features) and torch.equal(model.classifier(pooled), model(image()))
    if variant == "linear":
        assert features.shape == (4, model.num_features)
    model.set_grad_checkpointing()


@pytest.mark.parametrize("variant", ["linear", "mlp", "attention", "resnet10t"])
def test_a_new_head_for_other_findings_trains_and_is_saved_with_its_labels(variant, tmp_path):
    model = build(variant)
    model.reset_classifier(labels=["Stent", "Clip", "Drain"])
    assert model.labels == ("Stent", "Clip", "Drain") and model.num_classes == 3
    x = image()
    assert model.eval()(x).shape == (4, 3) and not model(x).any()
    train(model, torch.optim.AdamW(model.parameter_groups()))
    model.save_pretrained(tmp_path)
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)
    assert again.labels == model.labels and model.eval()(x).any() and torch.equal(again(x), model(x))


def test_labels_and_number_of_classes_never_differ():
    model = build("linear")
    eighteen = model.labels
    model.reset_classifier(18)
    assert model.labels == eighteen and str(model.load_report).endswith("head: linear, new")
    model.reset_classifier(2)
    assert model.labels == ("class 0", "class 1") and model(image()).shape == (4, 2)
    model.reset_classifier(2, labels=["a", "b"])
    assert model.labels == ("a", "b")
    for number, labels, message in (
        (3, ["c", "d"], "found labels .'c', 'd'. for 3 classes, expected a list of different names"),
        (None, ["c", "c"], "expected a list of different names"),
        (None, "Nodule", "expected a list of different names"),
        (0, None, "found no class, expected at least one; features without a head are features"),
        (None, [], "found no class"),
        (None, {"a", "b"}, "expected a list of different names"),  # a set has no order
        (None, {"a": 1, "b": 0}, "expected a list of different names"),
        (None, ["a", None], "expected a list of different names"),
        (2.0, None, "found 2.0 classes, expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(number, labels=labels)
    assert model.labels == ("a", "b") and model.classifier.out_features == 2
    with pytest.raises(ValueError, match=r"reset_classifier\(labels=...\) for a new head"):
        CTCLIPMultiAbnormalityModel(CLIP, labels=["a"])

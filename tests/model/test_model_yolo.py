from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from horoyolo.config import InputError
from horoyolo.model.blocks import SPP, SPPF, Conv
from horoyolo.model.yolo import ACTIVATION_NAMES, MODELS, YOLO, build_model, fuse_conv_bn, load_layer_table, model_from_table

TINY = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]]],
    "head": [[[1, 2], 1, "Detect", ["nc", "anchors"]]],
}


def shake_bn(model: nn.Module) -> nn.Module:
    """Gives BatchNorm statistics and factors that are not those of initialisation."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.uniform_(-0.2, 0.2, generator=generator)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.7, 1.4, generator=generator)
    return model


def edited(**changes) -> dict:
    return {**TINY, **changes}


def test_parameter_counts_are_the_public_ones(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda *args, **kwargs: None)  # seconds of random numbers that no one reads
    golden = json.loads((shared / "golden" / "parameter_counts.json").read_text())
    for size, counts in golden.items():
        for classes, count in counts.items():
            model = build_model(f"yolov5{size}", int(classes.removeprefix("nc")))
            assert sum(p.numel() for p in model.parameters()) == count, (size, classes)


def test_parameter_names_are_the_public_ones(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "loss_train.json").read_text())["grad_norms"]
    assert [name for name, _ in build_model("yolov5n").named_parameters()] == list(golden)


def test_parameter_count_by_hand() -> None:
    model = model_from_table(TINY)
    backbone = (3 * 8 * 9 + 16) + 2 * (8 * 8 * 9 + 16)
    assert sum(p.numel() for p in model.parameters()) == backbone + 2 * (8 * 14 + 14)


@pytest.mark.parametrize(("cfg", "strides"), [("yolov5n", (8, 16, 32)), ("yolov5n6.yaml", (8, 16, 32, 64))])
def test_heads_have_a_cell_per_stride(cfg: str, strides: tuple[int, ...]) -> None:
    model = build_model(cfg, num_classes=3)
    assert model.strides == strides
    heads = model(torch.zeros(2, 3, 128, 192))
    assert [tuple(head.shape) for head in heads] == [(2, 3, 128 // s, 192 // s, 8) for s in strides]
    assert model.decode(heads).shape == (2, sum(3 * (128 // s) * (192 // s) for s in strides), 8)


def test_building_leaves_running_statistics_alone() -> None:
    for module in model_from_table(TINY).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, 0.03)
            assert torch.equal(module.running_var, torch.ones(8))
            assert module.num_batches_tracked == 0


def test_decode_of_zero_logits_is_the_anchor_in_the_middle_of_its_cell() -> None:
    model = model_from_table(TINY)
    heads = [torch.zeros(1, 2, 4, 6, 7), torch.zeros(1, 2, 2, 3, 7)]
    decoded = model.decode(heads)[0]
    first = decoded[:48].view(2, 4, 6, 7)  # stride 4, anchors 10x13 and 16x30
    for y in range(4):
        for x in range(6):
            torch.testing.assert_close(first[0, y, x], torch.tensor([x * 4 + 2, y * 4 + 2, 10, 13, 0.5, 0.5, 0.5]))
            torch.testing.assert_close(first[1, y, x, 2:4], torch.tensor([16.0, 30.0]))
    torch.testing.assert_close(decoded[-1], torch.tensor([20.0, 12, 62, 45, 0.5, 0.5, 0.5]))


def test_initial_scores_are_those_of_few_objects() -> None:
    torch.manual_seed(0)
    model = model_from_table(TINY, num_classes=10)
    for conv, stride in zip(model.detect.m, model.strides, strict=True):
        bias = conv.bias.view(2, 15)
        rate = torch.tensor(8 / (640 / stride) ** 2)
        assert (bias[:, 4] - rate.log()).abs().max() <= 8**-0.5  # what torch's own initialisation adds
        assert (bias[:, 5:] - torch.tensor(0.6 / 9.00001).log()).abs().max() <= 8**-0.5


def test_fused_model_predicts_the_same() -> None:
    torch.manual_seed(0)
    model = shake_bn(build_model("yolov5n", num_classes=3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse_conv_bn(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused.decode(fused(images)), model.decode(model(images)), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("images", [0, 1, 2])
def test_bf16_channels_last_gives_every_parameter_a_gradient(images: int) -> None:
    torch.manual_seed(0)
    model = build_model("yolov5n", num_classes=2).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        heads = model(torch.rand(images, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    sum(head.float().square().sum() for head in heads).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() == (images > 0), name
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_memory_format_changes_no_result() -> None:
    torch.manual_seed(0)
    model = build_model("yolov5n", num_classes=2).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = model.decode(model(images))
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model.decode(model(images.contiguous(memory_format=torch.channels_last))), plain, rtol=1e-4, atol=1e-4)


def test_sppf_equals_spp() -> None:
    torch.manual_seed(0)
    spp, sppf = SPP(8, 8).eval(), SPPF(8, 8).eval()
    sppf.load_state_dict(spp.state_dict())
    x = torch.randn(1, 8, 20, 20)
    torch.testing.assert_close(spp(x), sppf(x))


@pytest.mark.parametrize("cfg", MODELS)
def test_a_name_may_carry_yaml_and_a_folder(cfg: str) -> None:
    assert load_layer_table(cfg) == load_layer_table(f"models/{cfg}.yaml")


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yolov5n.yaml").write_text(yaml.safe_dump(TINY))
    assert load_layer_table("yolov5n.yaml") == TINY
    assert len(load_layer_table("yolov5n")["anchors"]) == 3


OLD_TABLE = """
# parameters, in the layout of the older public tables
nc: 4
depth_multiple: 0.33  # model depth multiple
width_multiple: 0.25  # layer channel multiple
activation: nn.LeakyReLU(0.1)
anchors:
  - [116,90, 156,198, 373,326]  # P5/32
  - [30,61, 62,45, 59,119]  # P4/16
backbone:
  # [from, number, module, args]
  [[-1, 1, Focus, [64, 3]],
   [-1, 1, GhostConv, [128, 3, 2]],
   [-1, 3, BottleneckCSP, [128]],
   [-1, 6, Bottleneck, [128, False]],
   [-1, 1, nn.ZeroPad2d, [[0, 1, 0, 1]]],
   [-1, 1, nn.MaxPool2d, [2, 2, 0]],
   [-1, 3, C3Ghost, [256]],
   [-1, 1, DWConv, [256, 3, 2]],
   [-1, 1, SPP, [256, [3, 5]]],
   [-1, 1, GhostBottleneck, [256, 3, 2]],
   [-1, 3, C3TR, [256]],
  ]
head:
  [[-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 8], 1, Concat, [1]],
   [[12, 10], 1, Detect, [nc, anchors]],
  ]
"""


def test_older_tables_are_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD_TABLE)
    model = build_model(str(path))
    assert isinstance(model, YOLO)
    assert model.num_classes == 4
    assert model.strides == (16, 32)
    assert len(model.model[3]) == 2  # 6 repeats x 0.33
    assert len(model.model[2].m) == 1
    torch.testing.assert_close(model.anchors[0, 0], torch.tensor([30 / 16, 61 / 16]))  # in the order of the strides
    assert model.model[1].cv1.act.negative_slope == 0.1
    heads = model(torch.rand(2, 3, 64, 64))
    sum(head.sum() for head in heads).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_num_classes_replaces_the_tables_own() -> None:
    model = model_from_table(TINY, num_classes=7, names={0: "cell"})
    assert (model.num_classes, model.table["nc"], model.names) == (7, 7, {0: "cell"})
    assert TINY["nc"] == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (edited(nc=None), "nc is None"),
        (edited(nc=0), "nc is 0"),
        (edited(anchors=0), "anchors are 0"),
        (edited(anchors=True), "anchors are True"),
        (edited(anchors=[[1, 2, 3]]), "anchors"),
        (edited(anchors=[["a", 13], [30, 61]]), "anchors are [['a', 13], [30, 61]]"),
        (edited(backbone=[[-1, 1, "Conv", [8, 3, 1, None, 1, 1, "nn.ReLU()"]]]), "it takes no 'nn.ReLU()'; `activation:`"),
        (edited(anchors=[[10, 13]]), "1 rows of anchors for the 2 layers"),
        (edited(backbone=[[-1, 1, "Cnov", [8]]]), "unknown block 'Cnov', known are Conv"),
        (edited(backbone=[[-1, 1, ["Conv"], [8]]]), "unknown block"),
        (edited(backbone=[[-1, 1, "Conv"]]), "is not [from, repeats, block, arguments]"),
        (edited(backbone=[[5, 1, "Conv", [8]]]), "layer 0: from 5 does not name an earlier layer"),
        (edited(head=[[[0, 1], 1, "Conv", [8]], *TINY["head"]]), "layer 3: Conv cannot be built from [8] (it reads one layer, not 2)"),
        (edited(backbone=[[-1, "many", "Conv", [8]]]), "layer 0: Conv cannot be built"),
        (edited(backbone=[[-1, 1, "Conv", ["wide"]]]), "layer 0: Conv cannot be built"),
        (edited(head=[[-1, 1, "Conv", [8]]]), "the last layer must be Detect"),
        (edited(head=[[[-1, 0], 1, "Concat", [1]], *TINY["head"]]), "do not fit together"),
        (edited(activation="os.system('true')"), "unknown activation"),
        (edited(activation="nn.Linear(3)"), "unknown activation"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(table: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        model_from_table(table)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid yaml"),
        ("- 1", "no keys with values"),
        ("anchors: [[1, 2]]", "lacks backbone, head"),
        (b"\xff\xfe\x00", "not valid"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_layer_table(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cfg", ["yolov5q", "yolov8n", "yolov5n7.yaml", ""])
def test_an_unknown_name_names_the_known_ones(cfg: str) -> None:
    with pytest.raises(InputError, match="yolov5x6"):
        load_layer_table(cfg)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest is yolov5s"):
        load_layer_table("yolo5s")


def test_frozen_layers_do_not_learn_and_keep_their_statistics() -> None:
    model = model_from_table(TINY)
    model.freeze([0, 1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    model.train()
    sum(head.square().mean() for head in model(torch.rand(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {name.split(".")[1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2", "3"}
    assert [layer.training for layer in model.model] == [False, False, True, True]
    assert len(model.learning_layers()) == 2
    assert not any(module.training for module in model.eval().modules())


def test_what_can_not_be_frozen() -> None:
    with pytest.raises(InputError, match="layer 4 is beyond those of the model, 0 to 3"):
        model_from_table(TINY).freeze([4])
    with pytest.raises(InputError, match="all 4 layers"):
        model_from_table(TINY).freeze(range(4))


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_of_the_configuration_are_those_of_tables(name: str) -> None:
    model = model_from_table(edited(activation=ACTIVATION_NAMES[name]))
    kinds = {type(module.act).__name__.lower() for module in model.modules() if isinstance(module, Conv)}
    assert kinds == {name}


@pytest.mark.parametrize("count", [1, 3])
def test_a_table_may_say_only_how_many_anchors_a_layer_has(count: int) -> None:
    model = model_from_table(edited(anchors=count))
    assert model.anchors.shape == (2, count, 2)
    assert [head.shape[1] for head in model(torch.rand(1, 3, 64, 64))] == [count, count]

"""GFLOPs against a trace of the running model, by detectron2's `FlopCountAnalysis`."""

import copy

import pytest
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from minis import PARENT, build, fill

from eco_m2f.costs import ExitCosts, padded_size

pytestmark = pytest.mark.slow

SWIN = "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"
MINI_SWIN = [
    *("MODEL.SWIN.EMBED_DIM", 24, "MODEL.SWIN.DEPTHS", "[2, 2, 2, 2]", "MODEL.SWIN.NUM_HEADS", "[1, 2, 4, 8]"),
]


@pytest.fixture(scope="module", params=["r50", "swin"])
def mini(request):
    """A model, and a function that builds its parent with another number of encoder layers."""
    config, opts = (PARENT, []) if request.param == "r50" else (SWIN, MINI_SWIN)
    return lambda *more: fill(build(config, *opts, *more))


@pytest.fixture
def traceable(monkeypatch):
    """Replaces the op by one that counts nothing, because torch.jit cannot trace an operator with a list of sizes."""

    def uncounted(value, shapes, locations, weights):  # [N, Lq, M * D], from all it is given
        looked_at = (locations.sum((3, 4, 5)) + weights.sum((3, 4)))[..., None]  # [N, Lq, M, 1]
        return (looked_at + value.mean(1)[:, None]).flatten(2)

    def count(model, size, output):
        model = copy.deepcopy(model)
        published = model.sem_seg_head.decode  # makes all masks at full size, not only the last
        model.sem_seg_head.decode = lambda shared, state, aux: published(shared, state, aux=True)
        image = {"image": torch.zeros(3, *size), "height": output[0], "width": output[1]}
        trace = FlopCountAnalysis(model, [image]).set_op_handle("aten::scaled_dot_product_attention", attention_flops)
        return trace.unsupported_ops_warnings(False).uncalled_modules_warnings(False)

    monkeypatch.setattr("eco_m2f.ops.module.ms_deform_attn", uncounted)
    return count


def attention_flops(inputs, outputs) -> int:
    """fvcore does not know fused attention. This handle counts what fvcore counts for plain attention."""
    (batch, heads, queries, dim), (_, _, keys, _) = get_shape(inputs[0]), get_shape(inputs[1])
    masked = inputs[3].type().kind() != "NoneType" and inputs[3].type().scalarType() == "Bool"
    return batch * heads * queries * keys * dim * (1 if masked else 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size, output", [((61, 87), (50, 99)), ((130, 33), (131, 32))])
def test_a_trace_of_the_running_model_counts_the_same(mini, traceable, size, output):
    model = mini()
    trace, costs = traceable(model, size, output), ExitCosts(model, [6])
    padded = padded_size(size, model.size_divisibility)
    assert padded != size
    by_module = {name.removeprefix("model."): n for name, n in trace.by_module().items() if n}
    counted = costs.measure(padded)[6].by_module
    assert counted.keys() <= by_module.keys() and len(counted) > 100
    # fvcore rounds an einsum to four digits: the predictor's masks from queries, and the semantic product
    predictor = "sem_seg_head.predictor"
    assert counted[predictor] == pytest.approx(by_module[predictor], rel=1e-4)
    assert {**counted, predictor: None} == {name: by_module[name] for name in counted} | {predictor: None}
    assert costs.details(padded, output)[6]["total"] * 1e9 == pytest.approx(trace.total(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_an_exit_costs_what_a_parent_of_its_depth_does(mini, k):
    """By part. The model also has the layers after the exit, which do not run."""
    shallow = mini("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", k)
    costs = ExitCosts(mini(), [1, 3, 6])
    for size in ((64, 96), (32, 160)):
        assert costs.details(size)[k] == ExitCosts(shallow, [k]).details(size)[k]

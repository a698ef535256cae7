"""Plans against the compiler's own figures, against sums done by hand, and at full size."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import ablations, demo, hdtf
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks
from loki_jax.plan import attention_backend, parse_mesh
from loki_jax.planning.collectives import KINDS, Collective, parse_collectives, seconds, sent_bytes
from loki_jax.planning.memory import abstract_mesh, activations, live_bytes, peak_bytes
from loki_jax.planning.predict import PartTime, step_time
from loki_jax.planning.report import (
    PAPER_PARAMETERS,
    add_other_programs,
    check_batch,
    format_plan,
    local_plan,
    make_plan,
    parameter_table,
)
from loki_jax.planning.sweep import draw_sweep, sweep
from loki_jax.planning.work import PARTS, make_subject, parameters_by_part
from loki_jax.training.flops import Work, chip_named, live_jaxpr
from loki_jax.training.init import abstract_batch
from loki_jax.training.sharding import make_mesh
from loki_jax.training.step import make_eval_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def full():
    """The full-size config and its traced step of two windows."""
    subject = make_subject(hdtf.get_config(), builtin_head())
    return subject, local_plan(subject, 2, latents=False)


@pytest.fixture(scope="module")
def tiny():
    subject = make_subject(demo.get_config("tiny"), builtin_head())
    return subject, local_plan(subject, 1, latents=False)


def plan_of(fixture, data, fsdp, chip="h200", windows=2, backend="cudnn"):
    return make_plan(fixture[0], chip_named(chip), data, fsdp, windows, backend, local=fixture[1])


# --------------------------------------------------------------------------------------- full size


def test_the_papers_parameter_table(full):
    table = dict(parameter_table(parameters_by_part(full[0].state)))
    assert table == PAPER_PARAMETERS | {"at inference": 1_772_443_375}
    text = format_plan(plan_of(full, 8, 1), "hdtf")
    assert "1.772 B, the paper's count; 42.3% below X-Portrait's 3.07 B" in text
    assert "815,533,444" in text and "7,345,344" in text and "78,848" in text


@pytest.mark.parametrize("data, fsdp", [(1, 1), (8, 1), (1, 8), (32, 8), (256, 1)])
def test_full_size_on_1_8_and_256_devices(full, data, fsdp):
    plan = plan_of(full, data, fsdp)
    assert plan["batch"] == 2 * data * fsdp
    groups = plan["memory"]["groups"]
    assert groups["parameters"]["total"] == 4 * 822_878_788
    assert groups["optimiser moments"]["total"] == 2 * 4 * 822_878_788 + 8  # and two counters
    assert groups["frozen"]["total"] == 2 * (865_910_724 + 83_653_863 + 78_848)
    share = sum(groups[name]["per_device"] for name in ("parameters", "moving average", "optimiser moments"))
    whole = sum(groups[name]["total"] for name in ("parameters", "moving average", "optimiser moments"))
    assert share < whole / 7 if fsdp == 8 else share == whole
    assert {c["group"] for c in plan["collectives"]} == {n for n in (data, fsdp, data * fsdp) if n > 1}
    text = format_plan(plan, "hdtf")
    for section in (
        "PARAMETERS",
        "OPERATIONS",
        "BYTES ON A DEVICE",
        "WHAT IS SHARDED",
        "COLLECTIVES",
        "PREDICTED",
    ):
        assert section in text
    assert ("nothing: the fsdp axis has one device" in text) == (fsdp == 1)


def test_work_of_the_full_size_step(full):
    work = full[1][0]
    assert list(work) == list(PARTS)
    tokens = {320: (32, 4096, 8192), 640: (2, 16384, 17408), 1280: (2, 4096, 4352)}
    layers = {width: 5 for width in tokens}
    expected = (
        sum(layers[w] * 4 * b * n * m * w for w, (b, n, m) in tokens.items()) + 4 * 2 * 1024 * 1088 * 1280
    )
    assert work["generation forward"].attention == expected
    # The backward pass of attention is four products for two; recomputation does both again.
    assert work["backward"].attention == 2 * expected and work["recomputation"].attention == expected
    # Design: encoding the frames costs about as much as the UNet's forward pass.
    assert 0.8 < work["VAE encode"].matrix / work["generation forward"].matrix < 1.3


def test_flash_attention_is_what_makes_it_fit(full):
    memory = plan_of(full, 8, 1, chip="h100")["memory"]
    # 2 windows x 10 heads x 16,384 x 17,408 logits, 12 bytes each.
    assert memory["activations"]["attention"]["xla"] == 12 * 2 * 10 * 16384 * 17408
    assert memory["activations"]["attention"]["chunked"] < 1e9
    peaks = {name: max(moments.values()) for name, moments in memory["peak_by_attention"].items()}
    assert peaks["cudnn"] < peaks["chunked"] < peaks["xla"] > memory["usable"]
    assert memory["fits"] and peaks["cudnn"] < memory["usable"]
    assert not plan_of(full, 8, 1, chip="v5e", backend="splash")["memory"]["fits"]


# --------------------------------------------------------------------------- against the compiler


def test_plan_agrees_with_the_compiled_step(tmp_path):
    out = tmp_path / "plan.json"
    config = Path(__file__).with_name("shrunk_config.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "loki_jax.plan",
            "--config",
            str(config),
            "--mesh",
            "data=2,fsdp=2",
            "--compile",
            "--json",
            str(out),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # The figures come from before machine code is made, which takes most of the time.
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiling took" in done.stderr and "COMPILED for 4 simulated" in done.stdout
    plan = json.loads(out.read_text())
    found, memory = plan["compiled"], plan["memory"]
    # Bytes that stay are exact.
    assert found["argument_bytes"] == memory["resident"]
    assert found["donated_bytes"] == memory["resident"] - memory["batch"] - memory["head"]
    # Operations: XLA counts most elementwise work, fuses some of it away and loops once.
    work = plan["work_per_device"].values()
    matrix, vector = (4 * sum(w[key] for w in work) for key in ("matrix", "vector"))
    assert 0.97 * matrix < found["flops"] < 1.05 * (matrix + vector)
    assert found["traced_flops"] == pytest.approx(matrix, rel=0.02)
    # Temporaries are an estimate.
    temporary = max(memory["peak_by_attention"]["chunked"].values()) - memory["resident"]
    assert 0.5 < found["temporary_bytes"] / temporary < 2
    # Weights are gathered and gradients summed as planned; nothing else crosses the network.
    sizes = lambda collectives, kind: sum(c["bytes"] for c in collectives if c["kind"] == kind)
    for kind in KINDS:
        planned, compiled = sizes(plan["collectives"], kind), sizes(found["collectives"], kind)
        assert compiled == pytest.approx(planned, rel=0.01), kind


def test_accumulation_has_its_own_bytes():
    config = demo.get_config("tiny")
    config.grad_accum_steps = 2
    subject = make_subject(config, builtin_head())
    plan = make_plan(subject, chip_named("h200"), 2, 1, 2, "chunked")
    groups = plan["memory"]["groups"]
    assert groups["accumulated gradients"] == groups["gradients"]
    (reduced,) = plan["collectives"]  # of the sum over microbatches
    assert reduced["bytes"] == groups["gradients"]["total"]
    config.gradient_dtype = "bfloat16"
    plan = make_plan(make_subject(config, builtin_head()), chip_named("h200"), 2, 1, 2, "chunked")
    assert 2 * plan["collectives"][0]["bytes"] == reduced["bytes"]
    assert "gradients summed in bfloat16" in format_plan(plan, "tiny")


@pytest.mark.slow
def test_validation_and_sampling_are_counted(tiny):
    subject = tiny[0]
    found = {}
    for steps in (1, 2):
        subject.config.grad_accum_steps = steps
        plan = make_plan(subject, chip_named("h200"), 2, 1, 2, "xla")
        add_other_programs(plan, subject)
        found[steps] = plan["memory"]["other_programs"]
        resident = plan["memory"]["resident"]
    subject.config.grad_accum_steps = 1
    text = format_plan(plan, "tiny")
    assert "peak of validation" in text and "peak of sampling" in text
    assert found[2]["validation"] - resident < 0.7 * (found[1]["validation"] - resident)
    # As the compiler sees it: the validation loss of two windows on one device.
    mesh = make_mesh(1, 1, jax.devices()[:1])
    config = demo.get_config("tiny")
    head, params = subject.head, subject.state.params | subject.state.frozen
    step = jax.jit(make_eval_step(config, build_networks(config, head), mesh))
    compiled = step.lower(params, {}, abstract_batch(config, head), head, 0).compile()
    assert 0.4 < compiled.memory_analysis().temp_size_in_bytes / (found[1]["validation"] - resident) < 2.5


def test_bytes_alive_at_a_time():
    def chain(x):
        a = x + 1.0  # dies in the next line
        b = jnp.sin(a) * 2.0
        return jax.jit(lambda y: (y * 3.0) @ y.T)(b).sum()

    traced = jax.make_jaxpr(chain)(jax.ShapeDtypeStruct((64, 64), jnp.float32)).jaxpr
    array = 4 * 64 * 64
    # The call's argument, its product with 3, a transpose and the result of the product.
    assert 2 * array <= live_bytes(traced, set()) <= 4 * array


# --------------------------------------------------------------------------------------- activations


def test_kept_activations_are_what_the_backward_pass_reads():
    def loss(w, x):
        hidden = jnp.tanh(x @ w)  # kept: tanh's result
        hidden = jax.checkpoint(lambda h: jnp.tanh(jnp.tanh(h @ w) @ w))(hidden)  # keeps its input alone
        return (hidden @ w).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 16), (128, 16))]
    jaxpr = jax.jit(jax.value_and_grad(loss)).trace(*shapes).jaxpr
    found = activations(jaxpr)
    array = 4 * 128 * 16
    kept = sum(found.kept.values())
    # The first tanh's result (or its derivative with it), the checkpoint's output.
    assert 2 * array <= kept <= 3 * array
    # Two tanh results inside the checkpoint.
    assert 2 * array <= found.block <= 4 * array
    assert found.attention == dict.fromkeys(("xla", "chunked", "cudnn", "splash"), 0)
    assert live_jaxpr(jaxpr).eqns


def test_peak_adds_what_stands_at_the_same_time(tiny):
    step = activations(tiny[1][1])
    peak = peak_bytes(1000, 10, step, "xla", gathered=100)
    assert (
        peak["backward"]
        == 1110 + sum(step.kept.values()) + step.block + step.attention["xla"] + step.operation
    )
    assert peak["VAE encode"] == 1100 + step.encode


# --------------------------------------------------------------------------------------- collectives

HLO = """
  %all-reduce.5 = (f32[], f32[3,3,320,320]{3,2,1,0}) all-reduce(%a, %b), channel_id=1, replica_groups=mesh['x'=4,'y'=2] {'x'}, to_apply=%add
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%c), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %ag = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%c), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = bf16[64,64]{1,0} all-gather-done(%ag)
  %rs = f32[16,64]{1,0} reduce-scatter(%d), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %ag2 = bf16[64,32]{1,0} all-gather(%c), replica_groups=mesh['x'=2,'y'=1,'z'=4], device_ids=([4,2]T(1,0)) {'x'}, dimensions={0}
  %ar2 = f32[6]{0} all-reduce(%c), replica_groups=mesh['x'=16] {'x':(2)4}, to_apply=%add
  %cp = f32[10]{0} collective-permute(%e), source_target_pairs={{0,1},{1,0}}
  %fusion = f32[10]{0} fusion(%all-reduce.5), kind=kLoop
"""  # noqa: E501 (a program as XLA prints it)


def test_collectives_are_read_from_a_compiled_program():
    found = {(c.kind, c.group): (c.bytes, c.number) for c in parse_collectives(HLO, 8)}
    assert found == {
        ("all-reduce", 4): (4 + 4 * 9 * 320 * 320 + 24, 2),
        ("all-gather", 2): (2 * 64 * 64 + 2 * 64 * 32, 2),
        ("all-gather", 4): (2 * 64 * 64, 1),
        ("reduce-scatter", 4): (4 * 4 * 16 * 64, 1),
        ("collective-permute", 2): (40, 1),
    }


def test_bytes_sent_by_rings():
    of = lambda kind, group: sent_bytes(Collective(kind, "all", group, 800, 1, ""))
    assert of("all-reduce", 8) == 1400 and of("all-gather", 8) == of("reduce-scatter", 8) == 700
    assert of("collective-permute", 2) == 800


def test_time_of_collectives_within_and_beyond_a_domain():
    chip = chip_named("h100")._replace(link=100.0, network=10.0, domain=8)
    latency = lambda group: 10e-6 * math.log2(group)
    time = lambda kind, axis, group, data, fsdp: seconds(
        Collective(kind, axis, group, 800, 1, ""), chip, data, fsdp
    )
    assert time("all-gather", "fsdp", 8, 1, 8) == pytest.approx(7.0 + latency(8))
    assert time("all-reduce", "all", 8, 8, 1) == pytest.approx(14.0 + 2 * latency(8))
    # Four nodes: within one as before; each of its members carries an eighth over the network to three
    # others.
    assert time("all-gather", "all", 32, 32, 1) == pytest.approx(7.0 + 100 * 3 / 4 / 10 + latency(32))
    # Groups along data under fsdp=8 have one member in each node.
    assert time("all-gather", "data", 4, 4, 8) == pytest.approx(800 * 3 / 4 / 10 + latency(4))


def test_step_time_takes_the_slower_of_arithmetic_and_memory():
    chip = chip_named("h200")._replace(flops=100.0, bandwidth=10.0, link=8.0, domain=8)
    work = dict.fromkeys(PARTS, Work()) | {
        "backward": Work(matrix=300.0, bytes=5.0),
        "VAE encode": Work(matrix=10, bytes=20),
    }
    gradients = Collective("all-reduce", "all", 8, 32, 1, "")
    time = step_time(work, 30.0, [gradients], chip, 8, 1, efficiency=0.5)
    assert time.parts["backward"] == PartTime(6.0, 1.0) and time.parts["backward"].bound == "compute"
    assert time.parts["VAE encode"].bound == "memory" and time.parts["VAE encode"].seconds == 4.0
    assert time.device == 6.0 + 4.0 + 3.0 and time.floor == pytest.approx(3.1)
    assert time.network == pytest.approx(7.0, abs=1e-3)
    # Seven seconds of gradients hide under six of the backward pass but for one.
    assert time.overlapped == pytest.approx(14.0, abs=1e-3) and time.serial == pytest.approx(20.0, abs=1e-3)


# ------------------------------------------------------------------------------ program and configs


def test_other_configs_and_the_sweep(tiny, tmp_path):
    subject, local = tiny
    assert "another model than the paper's 1,772,443,375" in format_plan(
        plan_of(tiny, 2, 1, windows=1, backend="chunked"), "demo"
    )
    counts = {
        arm: parameters_by_part(make_subject(ablations.get_config(arm), builtin_head()).state)
        for arm in ("no_posenc",)
    }
    assert counts["no_posenc"]["conditioning encoder"] == 7_345_344 - 9 * 42 * 64
    rows = sweep(
        subject,
        [chip_named("h100"), chip_named("v5p")],
        [8, 64, 1024],
        1,
        {"h100": "cudnn", "v5p": "splash"},
        False,
        0.5,
    )
    assert [r["devices"] for r in rows if r["chip"] == "h100" and r["layout"] == "data"] == [8, 64, 1024]
    assert {r["layout"] for r in rows} == {"data", "fsdp=8", "fsdp=all"}
    for row in rows:
        assert row["device_s"] <= row["step_s"] <= row["serial_s"] and row["batch"] == row["devices"]
    times = [r["network_s"] for r in rows if r["chip"] == "h100" and r["layout"] == "data"]
    assert times == sorted(times)
    draw_sweep(rows, tmp_path / "new" / "sweep.png")
    assert (tmp_path / "new" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_latents_skip_the_vae(full):
    subject, (work, _) = full
    with_latents, _ = local_plan(subject, 1, latents=True)
    assert work["VAE encode"].matrix > 0 and with_latents["VAE encode"].matrix == 0
    assert with_latents["backward"].matrix == work["backward"].matrix / 2


def test_errors_are_one_clear_line():
    assert parse_mesh("data=32,fsdp=8") == (32, 8) and parse_mesh("fsdp=4") == (1, 4)
    for text in ("data=0", "model=2", "data=x", "8"):
        with pytest.raises(ValueError, match="write data=8,fsdp=1"):
            parse_mesh(text)
    assert check_batch(16, 8, 1) == 2
    with pytest.raises(
        ValueError, match=r"16 windows does not divide over 256 devices: give --batch 256 \(1 a device\)"
    ):
        check_batch(16, 256, 1)
    with pytest.raises(
        ValueError, match=r"in 2 microbatches: give --batch 48 \(6 a device\) or another multiple of 16"
    ):
        check_batch(60, 8, 2)


def test_the_program_plans_and_refuses():
    command = [sys.executable, "-m", "loki_jax.plan", "--config", "configs/demo.py:tiny"]
    run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
    done = run("--mesh", "data=2", "--chip", "v5e")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(
        "configs/demo.py:tiny: mesh data=2 x fsdp=1 of v5e, batch 2 (1 windows a device)"
    )
    assert "PREDICTED STEP on v5e" in done.stdout
    refused = run("--mesh", "data=3")
    assert refused.returncode == 1 and not refused.stdout
    assert (
        refused.stderr.strip()
        .splitlines()[-1]
        .startswith("error: a batch of 2 windows does not divide over 3 devices")
    )


def test_attention_backend_of_a_chip():
    model = hdtf.get_config().model
    assert attention_backend(None, model, chip_named("h100")) == "cudnn"
    assert attention_backend(None, model, chip_named("v5p")) == "splash"
    assert attention_backend("chunked", model, chip_named("v5p")) == "chunked"
    model.dtype = "float32"
    assert attention_backend(None, model, chip_named("h100")) == "chunked"


def test_shard_sizes_need_no_devices():
    sharding = NamedSharding(abstract_mesh(32, 8), PartitionSpec("fsdp"))
    assert sharding.shard_shape((64, 3)) == (8, 3)

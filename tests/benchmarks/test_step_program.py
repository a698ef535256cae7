"""The parts of the step that are measured are those of the step."""

import jax

from benchmarks.step_program import measure, parts
from loki_jax.face.builtin import builtin_head
from loki_jax.planning.work import make_subject
from loki_jax.training.sharding import make_mesh
from tests.training.tiny_run import tiny_config


def test_parts_trace_and_update_compiles(tmp_path):
    config = tiny_config(tmp_path, driver__arm="full")
    programs = parts(make_subject(config, builtin_head()), make_mesh(1, 1, jax.devices()[:1]))
    drawn = jax.eval_shape(*programs["driver map"][:1], *programs["driver map"][1])
    assert drawn.shape[:2] == (config.batch_size, config.window)
    (gradients, arguments), (step, _) = programs["loss and gradients"], programs["step"]
    loss, grads = jax.eval_shape(gradients, *arguments)
    assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(lambda x: x.shape, arguments[0].params)
    assert jax.eval_shape(step, *arguments)[1].keys() == {"loss", "grad_norm", "skipped"}

    found = measure(lambda x: x + 1.0, (jax.ShapeDtypeStruct((3,), "float32"),))
    assert found["instructions"] >= 2 and found["compiled_instructions"] >= 2

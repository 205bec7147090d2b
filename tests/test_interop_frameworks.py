"""Adapters in the real frameworks: batch norm, dropout and taps inside one compiled step."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

from kdtl_jax import train, transforms, trees
from kdtl_jax.interop import linen, naming, nnx, safetensors

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 2
TAPS_NNX = hasattr(flax_nnx, "capture")  # flax >= 0.12.6; before, sown values alone


class Bound(NamedTuple):
    """One framework's model: how to run it, and where its tap and a kernel are found."""

    apply: Any
    params: Any
    state: Any
    tap: str
    first_kernel: str


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Dense(4, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(jax.nn.relu(x))
        return nn.Dense(2, name="head")(x)


class NNXNet(flax_nnx.Module):
    def __init__(self, rngs: flax_nnx.Rngs):
        self.layers = flax_nnx.List([flax_nnx.Linear(3, 4, rngs=rngs)])
        self.norm = flax_nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.drop = flax_nnx.Dropout(0.5, rngs=rngs)
        self.head = flax_nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.drop(jax.nn.relu(self.norm(self.layers[0](x))))
        return self.head(x)


class EquinoxNet(eqx.Module):
    first: Any
    norm: Any
    drop: Any
    head: Any
    activation: Any

    def __init__(self, key: Any):
        key_first, key_head = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, key=key_first)
        self.norm = eqx.nn.BatchNorm(4, "batch", momentum=0.5, mode="batch")
        self.drop = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(4, 2, key=key_head)
        self.activation = jax.nn.relu

    def __call__(self, x: Any, state: Any, *, key: Any = None) -> Any:
        hidden = self.first(x)
        x, state = self.norm(hidden, state)
        x = self.drop(self.activation(x), key=key)
        return {"logits": self.head(x), "first": hidden}, state


def haiku_net(x: Any, train: bool) -> Any:
    x = hk.Linear(4, name="first")(x)
    x = hk.BatchNorm(True, True, 0.5, name="norm")(x, is_training=train)
    x = jax.nn.relu(x)
    x = hk.dropout(hk.next_rng_key(), 0.5, x) if train else x
    return hk.Linear(2, name="head")(x)


def linen_model() -> Bound:
    run = linen.model(LinenNet(), taps=["first"])
    variables = run.init(jax.random.key(0), X[:1])
    return Bound(run.apply, variables.params, variables.model_state, "first", "first/kernel")


def nnx_model() -> Bound:
    bound = nnx.model(NNXNet(flax_nnx.Rngs(0)), taps=["layers/0"])
    return Bound(*bound, "layers/0", "layers/0/kernel")


def equinox_model() -> Bound:
    from kdtl_jax.interop import equinox

    module, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0))
    return Bound(*equinox.model(module, state), "first", "first/weight")


def haiku_model() -> Bound:
    from kdtl_jax.interop import haiku

    run = haiku.model(haiku_net, taps=["first"])
    variables = run.init(jax.random.key(0), X[:1])
    return Bound(run.apply, variables.params, variables.model_state, "first", "first/w")


FRAMEWORKS = {
    "linen": linen_model,
    "nnx": nnx_model,
    "equinox": equinox_model,
    "haiku": haiku_model,
}


def changed(before: Any, after: Any) -> bool:
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return any(
        not np.array_equal(a, b)
        for a, b in leaves
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.usefixtures("standard_promotion")
def test_one_compiled_step_trains_with_statistics_dropout_and_taps(framework: str):
    if framework == "nnx" and not TAPS_NNX:
        pytest.skip("this flax has no outputs of NNX submodules")
    bound = FRAMEWORKS[framework]()
    traces = []

    def terms(inputs: Any) -> Any:
        traces.append(None)
        tap = inputs.student[bound.tap]
        assert tap.shape == (8, 4)
        return {
            "task": optax.softmax_cross_entropy_with_integer_labels(
                inputs.student["logits"], inputs.batch["labels"]
            ),
            "feature": jnp.mean(tap**2, axis=-1),
        }

    tx = optax.adam(0.05)
    state = train.init_state(bound.params, tx, key=jax.random.key(1), model_state=bound.state)
    step = train.jit_step(train.make_step(bound.apply, terms, {"task": 1.0, "feature": 0.01}, tx))
    batch = {"inputs": jnp.asarray(X), "labels": jnp.asarray(LABELS)}
    structure = jax.tree.structure(state)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value()))
    assert len(traces) == 1, "compiled more than once"
    assert jax.tree.structure(state) == structure
    assert all(np.isfinite(losses)) and len(set(losses)) == 4
    assert changed(bound.params, state.params)
    assert changed(bound.state, state.model_state)  # statistics moved

    evaluate = jax.jit(bound.apply)
    outputs, after = evaluate(state.params, state.model_state, batch["inputs"])
    again, _ = evaluate(state.params, state.model_state, batch["inputs"])
    assert not changed(state.model_state, after)
    np.testing.assert_array_equal(outputs["logits"], again["logits"])

    run = jax.jit(lambda key: bound.apply(state.params, state.model_state, X, key=key, train=True))
    one, two, one_again = (run(jax.random.key(i))[0]["logits"] for i in (0, 1, 0))
    assert changed([one], [two]) and not changed([one], [one_again])  # the key decides


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.usefixtures("standard_promotion")
def test_selectors_transfer_and_files_work_on_the_trees(framework: str, tmp_path: Any):
    bound = FRAMEWORKS[framework]()
    assert bound.first_kernel in trees.flatten(bound.params)
    chosen, rest = trees.partition(bound.params, bound.first_kernel)
    assert len(jax.tree.leaves(chosen)) == 1
    assert jax.tree.structure(trees.combine(chosen, rest)) == jax.tree.structure(bound.params)
    doubled = transforms.scale(bound.params, 2.0)
    safetensors.save(tmp_path / "w.safetensors", doubled)
    filled, report = transforms.transfer(safetensors.load(tmp_path / "w.safetensors"), bound.params)
    assert report.fraction == 1 and jax.tree.structure(filled) == jax.tree.structure(bound.params)
    restored = safetensors.load_tree(tmp_path / "w.safetensors", like=bound.params)
    for got in (filled, restored):
        for path, leaf in trees.flatten(got).items():
            np.testing.assert_array_equal(leaf, 2 * trees.flatten(bound.params)[path], err_msg=path)


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "equinox"])
@pytest.mark.usefixtures("standard_promotion")
def test_a_misspelt_tap_lists_what_exists(framework: str):
    def build(tap: str) -> Any:
        if framework == "linen":
            return linen.model(LinenNet(), taps=[tap]).apply
        if framework == "nnx":
            return nnx.model(NNXNet(flax_nnx.Rngs(0)), taps=[tap]).apply
        from kdtl_jax.interop import haiku

        return haiku.model(haiku_net, taps=[tap]).apply

    bound = FRAMEWORKS[framework]()
    near = bound.tap if framework != "nnx" or TAPS_NNX else "need flax >= 0.12.6"
    with pytest.raises(ValueError, match=f"tap 'frist' matches no .*{near}"):
        jax.eval_shape(build("frist"), bound.params, bound.state, X)


class SharedNNX(flax_nnx.Module):
    def __init__(self, rngs: flax_nnx.Rngs):
        self.dense = flax_nnx.Linear(3, 3, rngs=rngs)
        self.drop = flax_nnx.Dropout(0.5, rngs=rngs)
        self.other: Any = flax_nnx.Dropout(0.5, rngs=flax_nnx.Rngs(dropout=7))

    def __call__(self, x: Any) -> Any:
        self.sow(flax_nnx.Intermediate, "inside", x)
        return {"logits": self.other(self.drop(self.dense(self.dense(x)))), "extra": x}


def test_nnx_every_stream_is_rekeyed_whatever_it_is_called():
    module = SharedNNX(flax_nnx.Rngs(0))
    before = jax.tree.map(jax.random.key_data, [module.other.rngs.key.get_value()])
    taps = ["dense/.*", "inside"] if TAPS_NNX else ["inside"]
    bound = nnx.model(module, taps=taps)
    ones = jnp.ones((2, 3))
    runs = [
        bound.apply(bound.params, bound.model_state, ones, key=jax.random.key(i), train=True)
        for i in (0, 1, 0)
    ]
    outputs = [run[0] for run in runs]
    dense = {"dense/0", "dense/1"} if TAPS_NNX else set()
    assert set(outputs[0]) == {"logits", "extra", "inside", *dense}
    assert changed([outputs[0]["logits"]], [outputs[1]["logits"]])
    assert not changed([outputs[0]["logits"]], [outputs[2]["logits"]])
    keys = [trees.flatten(run[1]) for run in runs]
    streams = [path for path in keys[0] if path.endswith("rngs/key")]
    assert len(streams) == 2  # a `default` stream and one called `dropout`
    for path in streams:
        data = [jax.random.key_data(k[path]).tolist() for k in keys]
        assert data[0] == data[2] != data[1]
    drawn = {tuple(jax.random.key_data(keys[0][path]).tolist()) for path in streams}
    assert len(drawn) == 2  # each stream its own key
    assert not any("inside" in path for path in keys[0])  # sown values never become state
    after = jax.tree.map(jax.random.key_data, [module.other.rngs.key.get_value()])
    assert not changed(before, after)  # the module itself was never touched
    assert not hasattr(module, "__captures__")


def test_nnx_parameters_go_back_into_the_module():
    module = NNXNet(flax_nnx.Rngs(0))
    bound = nnx.model(module)
    flax_nnx.update(module, transforms.scale(bound.params, 0.0))
    assert not np.asarray(module.head.kernel[...]).any()


def test_nnx_and_linen_trees_meet_by_path():
    ours = {"layers": {"0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}}
    bound = nnx_model()
    params, report = transforms.transfer(ours, bound.params, where="layers/0/.*")
    assert set(report.copied) == {"layers/0/kernel", "layers/0/bias"}
    assert np.asarray(trees.flatten(params)["layers/0/kernel"]).all()


def test_equinox_takes_trained_parameters_back():
    from kdtl_jax.interop import equinox

    module = eqx.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(0))
    bound = equinox.model(module)
    assert bound.model_state is None
    new = equinox.with_params(module, transforms.scale(bound.params, 0.0))
    assert not np.asarray(new.layers[0].weight).any() and new.activation is module.activation
    outputs, state = bound.apply(bound.params, None, X)
    np.testing.assert_allclose(outputs["logits"], jax.vmap(module)(jnp.asarray(X)), rtol=1e-6)
    assert state is None
    with pytest.raises(ValueError, match="must have the structure"):
        equinox.with_params(module, {"weight": jnp.ones(1)})


def test_haiku_names_with_slashes_are_never_split():
    from kdtl_jax.interop import haiku

    def net(x: Any, train: bool) -> Any:
        del train
        return hk.nets.MLP([4, 2], name="net")(x)

    run = haiku.model(net, taps=["net/~/linear_0"])
    variables = run.init(jax.random.key(0), X)
    assert variables.model_state is None
    assert set(variables.params) == {"net/~/linear_0", "net/~/linear_1"}
    frozen, _ = trees.partition(variables.params, "net/~/linear_0/w")
    assert len(jax.tree.leaves(frozen)) == 1
    outputs, state = run.apply(variables.params, None, X, train=True)
    assert outputs["net/~/linear_0"].shape == (8, 4) and state is None


class Scanned(nn.Module):
    """Three layers as one scanned module with boxed (partitioned) kernels."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                return jax.nn.relu(nn.Dense(3, kernel_init=init, name="fc")(x)), None

        stack = nn.scan(
            Layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(name="stack")(x, None)
        return nn.Dense(2, name="head")(x)


@pytest.mark.usefixtures("standard_promotion")
def test_linen_boxed_and_scanned_parameters():
    run = linen.model(Scanned(), taps=["stack/fc"])
    variables = run.init(jax.random.key(0), X)
    flat = trees.flatten(variables.params)
    assert flat["stack/fc/kernel"].shape == (3, 3, 3)  # no /value in the path
    outputs, _ = run.apply(variables.params, variables.model_state, X)
    assert outputs["stack/fc"].shape == (3, 8, 3)  # one per layer
    assert isinstance(variables.params["stack"]["fc"]["kernel"], nn.Partitioned)
    scaled = transforms.scale(variables.params, 0.5, where="stack/.*/kernel")
    assert isinstance(scaled["stack"]["fc"]["kernel"], nn.Partitioned)
    one = {"head": {"kernel": np.ones((3, 2), np.float32)}}
    filled, _ = transforms.transfer(one, variables.params, where="head/kernel")
    assert np.asarray(trees.flatten(filled)["head/kernel"]).all()
    grads = jax.grad(lambda p: jnp.sum(run.apply(p, None, X)[0]["logits"]))(scaled)
    assert jax.tree.structure(grads) == jax.tree.structure(scaled)


def test_linen_convention_names_the_torch_twin():
    variables = linen_model()
    tree = {"params": variables.params, **variables.state}
    rules = naming.convention(tree, prefix="net.")
    tensors = naming.to_torch(tree, rules)
    assert tensors["net.first.weight"].shape == (4, 3)
    assert {"net.norm.running_mean", "net.norm.weight", "net.norm.bias"} <= set(tensors)
    back = naming.from_torch(tensors, rules)
    for path, leaf in trees.flatten(tree).items():
        np.testing.assert_array_equal(back[path], leaf)


def test_an_nnx_state_left_behind_is_named_with_the_repair() -> None:
    model, params, _ = nnx.model(flax_nnx.BatchNorm(3, rngs=flax_nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match="BatchNorm has 2 arrays besides.*got 0.*model_state=state"
    ):
        model(params, None, jnp.ones((2, 3)))

"""The chain log rebuilds weights bit by bit and refuses what is not its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from raclora_jax.checkpoint import ChainLog

LINKS = 4
SPECS = {
    "float32": ("float32", rl.Spec(2)),
    "bfloat16": ("bfloat16", rl.Spec(2, alpha="dim")),
    "drawn side": ("float32", rl.Spec(2, side=0.5)),
    "no cache": ("bfloat16", rl.Spec(2, cache=False)),
    "frozen rest": ("bfloat16", rl.Spec(2, rest="frozen", sketch="block")),
}

pytestmark = pytest.mark.usefixtures("quick_draws")


def base_of(dtype="float32", seed=0):
    kernel = jax.random.normal(jax.random.key(seed), (9, 7))
    leaves = {"kernel": kernel, "bias": jnp.arange(7.0), "scale": jnp.asarray(0.3)}
    return {path: leaf.astype(dtype) for path, leaf in leaves.items()}


def trained(factors, link):
    """Stands for a link of training: numbers that round."""
    return jax.tree.map(
        lambda f: f + jnp.sin(link + jnp.arange(f.size) + 0.1).reshape(f.shape), factors
    )


def run(folder, spec, base, key=3, links=LINKS):
    log, (factors, chain) = ChainLog(folder), rl.init_adapter(base, spec, key=key)
    all_weights = [base]
    for link in range(links):
        factors = trained(factors, link)
        base, factors, chain = log.next_link(base, factors, chain, spec)
        all_weights.append(base)
    return log, all_weights


def assert_same_bits(got, want):
    for path, weight in want.items():
        assert got[path].dtype == weight.dtype
        assert np.asarray(got[path]).tobytes() == np.asarray(weight).tobytes()


@pytest.mark.parametrize("name", SPECS)
def test_rebuilds_bit_by_bit(name, tmp_path):
    dtype, spec = SPECS[name]
    _, weights = run(tmp_path, spec, base_of(dtype))
    assert not np.array_equal(weights[0]["kernel"], weights[-1]["kernel"])
    log = ChainLog(tmp_path)
    assert log.links() == list(range(LINKS))
    assert_same_bits(log.rebuild(base_of(dtype)), weights[-1])
    assert_same_bits(log.rebuild(base_of(dtype), links=2), weights[2])


def test_a_log_that_begins_later(tmp_path):
    """Records of the first links are not needed where the weights after them are."""
    log, weights = run(tmp_path, rl.Spec(2), base_of())
    for link in (0, 1):
        (tmp_path / f"link-{link:08d}").unlink()
    assert_same_bits(log.rebuild(weights[2]), weights[-1])


def test_sharded_weights(tmp_path):
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((7,), ("d",), auto, devices=jax.devices()[:7])
    home = NamedSharding(mesh, PartitionSpec(None, "d"))
    base = base_of()
    spread = base | {"kernel": jax.device_put(base["kernel"], home)}
    log, weights = run(tmp_path, rl.Spec(2), spread)
    assert_same_bits(log.rebuild(spread), weights[-1])


def test_a_run_set_back_writes_the_same_again(tmp_path):
    _, weights = run(tmp_path, rl.Spec(2), base_of())
    log, again = run(tmp_path, rl.Spec(2), base_of(), links=2)
    assert_same_bits(again[2], weights[2])
    assert_same_bits(log.rebuild(base_of()), weights[-1])
    with pytest.raises(
        ValueError, match=r"link-00000000 is there already and holds other"
    ):
        run(tmp_path, rl.Spec(2), base_of(), key=4)
    assert_same_bits(log.rebuild(base_of()), weights[-1])


def harmed(folder, link, change):
    path = folder / f"link-{link:08d}"
    path.write_bytes(change(path.read_bytes()))


def test_a_cut_record_is_refused_by_name(tmp_path):
    log, weights = run(tmp_path, rl.Spec(2), base_of())
    for change in (
        lambda raw: raw[:-3],
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
    ):
        whole = (tmp_path / "link-00000002").read_bytes()
        harmed(tmp_path, 2, change)
        with pytest.raises(
            ValueError, match=r"link-00000002 is no whole record.*cut short"
        ):
            log.rebuild(base_of())
        assert_same_bits(log.rebuild(base_of(), links=2), weights[2])
        (tmp_path / "link-00000002").write_bytes(whole)
    (tmp_path / "link-00000001").unlink()
    with pytest.raises(FileNotFoundError, match="link-00000001 is missing"):
        log.rebuild(base_of())
    with pytest.raises(FileNotFoundError, match="no record in"):
        ChainLog(tmp_path / "new").rebuild(base_of())


def test_a_foreign_record_is_refused_by_name(tmp_path):
    mine, _ = run(tmp_path / "mine", rl.Spec(2), base_of())
    run(tmp_path / "yours", rl.Spec(2), base_of(seed=1))
    foreign = (tmp_path / "yours" / "link-00000001").read_bytes()
    harmed(tmp_path / "mine", 1, lambda raw: foreign)
    with pytest.raises(
        ValueError, match=r"link-00000001, leaf 'kernel': .*other weights"
    ):
        mine.rebuild(base_of())
    with pytest.raises(
        ValueError, match=r"link-00000000, leaf 'kernel': .*other weights"
    ):
        mine.rebuild(base_of(seed=2))


def test_a_record_under_another_name_is_refused(tmp_path):
    """In a chain whose weights rest, nothing but its own number tells a record's link."""
    log, (factors, chain) = ChainLog(tmp_path), rl.init_adapter(base_of(), 2, key=0)
    base = base_of()
    for _ in range(2):
        base, factors, chain = log.next_link(base, factors, chain, 2)
    (tmp_path / "link-00000001").write_bytes((tmp_path / "link-00000000").read_bytes())
    with pytest.raises(
        ValueError, match="link-00000001 is the record of link 0, not of 1"
    ):
        log.rebuild(base_of())


def test_a_killed_write_leaves_nothing_that_counts(tmp_path):
    log, weights = run(tmp_path, rl.Spec(2), base_of(), links=2)
    (tmp_path / ".link-00000002.partial").write_bytes(b"half")
    assert log.links() == [0, 1]
    assert_same_bits(log.rebuild(base_of()), weights[2])

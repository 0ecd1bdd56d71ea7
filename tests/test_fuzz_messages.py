"""Forged messages: no round ends by one, and no mean is another's."""

from benchmarks.pods.fuzzing.messages import cases
from raclora_jax.federated import _checks


def wrong(seed, count, folder):
    return [
        case.name for case in cases(seed, count, folder) if not case.right(case.read())
    ]


def test_no_forged_message_ends_a_round_or_moves_its_mean(tmp_path):
    assert wrong(3, 90, tmp_path) == []


def test_a_server_that_takes_weights_without_their_sign_is_found(tmp_path, monkeypatch):
    number = _checks._number

    def unsigned(value):
        found = number(value)
        return found if found is None else abs(found)

    monkeypatch.setattr(_checks, "_number", unsigned)
    found = [name for seed in range(3) for name in wrong(seed, 6, tmp_path)]
    assert found
    assert all("another_count" in name for name in found)

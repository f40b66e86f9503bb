"""From when an acknowledged item's lease counts, when an answer was lost (README, D8)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from workpool.pool.acknowledge import Acknowledger
from workpool.pool.claim import Claim
from workpool.testing.local import Trouble
from workpool.testing.virtual import in_virtual_time

if TYPE_CHECKING:
    from tests.unit.conftest import Bench


@pytest.mark.parametrize(
    ("trouble", "first"),
    [
        (Trouble(answer="silence"), True),
        (Trouble(answer="reset", applied=False), True),
        (Trouble(answer=500), True),
        (Trouble(answer=429, applied=False), False),
    ],
    ids=["silence", "reset", "500", "429"],
)
@in_virtual_time
async def test_the_lease_counts_from_the_first_ack_that_may_have_been_applied(
    bench: type[Bench], trouble: Trouble, *, first: bool
) -> None:
    """Believing in the last one's sixty seconds, we would beat for what another worker has."""
    one = bench(ack=[trouble])
    await one.calls.__aenter__()
    one.operations.enqueue(one.settings.environment_id or "")
    item = await one.calls.poll()
    assert item is not None
    parts: Any = SimpleNamespace(
        settings=one.settings, calls=one.calls, clock=one.clock, observe=lambda _: None
    )
    claim = Claim(item, None, parts, one.clock())
    assert await Acknowledger(parts).acknowledge(claim) == "ok"
    sent = one.times("ack")
    assert len(sent) == 2
    assert sent[0] < sent[1]
    assert claim.acked_at == (sent[0] if first else sent[1])

"""On-demand synthetic cases from a run's generator, an endless stream whose i-th case of a query is always the same.

A query is a selection and a seed. Its candidates are numbered. A batch is always generated as a whole, so that neither
the start of a stream nor the number of cases requested changes any of them. Sampling costs no further privacy: samples
of the generator are covered by the generator's guarantee (post-processing).
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from fedcmr.server.delivery.query import Refusal, bad_request
from fedcmr.server.generation.synthesis import EF_RANGE, SharedGenerator, load_shared_generator, synthesize_requested
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config
from fedcmr.shared.case import Case
from fedcmr.shared.delivery.contract import MAX_SEED, ef_range, matches
from fedcmr.shared.delivery.delivery_pb2 import Selection
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior, load_prior

BATCH = 16
MIN_EF_WIDTH = 0.02
"""Narrowest range of ejection fractions. Hearts meet the requested one to about 0.01; few would lie in less."""
MAX_EMPTY_BATCHES = 8
MAX_CANDIDATES = 10_000_000
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Query:
    """A checked request for on-demand cases.

    Attributes:
        vendors: Vendors whose style is sampled, in turn.
        low: Lowest ejection fraction of a case, as a fraction.
        high: Highest ejection fraction of a case.
        selection: What the cases must match.
        key: Identifies this query; the cases' names begin with it, and it seeds their random numbers.
    """

    vendors: tuple[str, ...]
    low: float
    high: float
    selection: Selection
    key: str

    def name(self, number: int) -> str:
        """The pseudonym of a candidate; names sort as numbers do."""
        # Begins as in version 0.1, so that a set that was begun then can be resumed.
        return f"fresh-{self.key[:8]}-{number:07d}"

    def number_after(self, pseudonym: str) -> int:
        """The candidate that follows the one of this name; 0 after none.

        Raises:
            Refusal: The name belongs to another query.
        """
        if not pseudonym:
            return 0
        number = pseudonym.rpartition("-")[2]
        if not (number.isascii() and number.isdecimal() and self.name(int(number)) == pseudonym):
            raise bad_request("'after' is no case of this seed and selection")
        return int(number) + 1

    def requested(self, batch: int) -> tuple[list[str], list[float]]:
        """Vendors and ejection fractions requested for a batch; a vendor's are spread evenly, however many there are.

        The golden ratio's multiples modulo 1 leave no gap much larger than any other.
        """
        names, efs = [], []
        for number in range(batch * BATCH, (batch + 1) * BATCH):
            vendor = self.vendors[number % len(self.vendors)]
            start = _fraction(self.key, vendor)
            efs.append(self.low + (self.high - self.low) * ((start + number // len(self.vendors) * GOLDEN) % 1))
            names.append(vendor)
        return names, efs


class OnDemandSampler:
    """Samples from one generator, for one stream at a time, because all streams share the machine's cores.

    Attributes:
        generator_sha256: SHA-256 of the run's generator.safetensors.
    """

    def __init__(self, prior: Prior, shared: SharedGenerator, config: Config, generator_sha256: str):
        self._prior, self._shared, self._config = prior, shared, config
        self.generator_sha256 = generator_sha256
        self._lock = threading.Lock()

    def query(self, selection: Selection, seed: int) -> Query:
        """The query that a request stands for; the selection must be a checked one.

        Raises:
            Refusal: It cannot be sampled.
        """
        vendors = tuple(sorted(set(selection.vendors))) or tuple(sorted(self._shared.styles))
        unknown = sorted(set(vendors) - set(self._shared.styles))
        if unknown:
            raise bad_request(f"the study has learnt {', '.join(sorted(self._shared.styles))}, not {unknown[0]}")
        low, high = ef_range(selection)
        low, high = max(low, EF_RANGE[0]), min(high, EF_RANGE[1])
        if high - low < MIN_EF_WIDTH:
            raise bad_request(
                f"expected ejection fractions at least {MIN_EF_WIDTH} apart, within {EF_RANGE[0]:g} to {EF_RANGE[1]:g}"
            )
        if not 0 <= seed <= MAX_SEED:
            raise bad_request(f"expected a seed of at most {MAX_SEED}")
        text = f"{self.generator_sha256}/{seed}/{'+'.join(vendors)}/{low!r}/{high!r}"
        return Query(vendors, low, high, selection, hashlib.sha256(text.encode()).hexdigest())

    def cases(self, query: Query, after: str = "") -> Iterator[Case]:
        """The query's cases that follow `after`, without end.

        Raises:
            Refusal: `after` belongs to another query, or no more cases are found.
        """
        first = query.number_after(after)
        empty = 0
        for batch in range(first // BATCH, MAX_CANDIDATES // BATCH):
            found = False
            for number, case in enumerate(self._generate(query, batch), start=batch * BATCH):
                # The ejection fraction of the masks may lie beyond the range by about a pixel.
                if number >= first and matches(case.info, query.selection):
                    found = True
                    name = query.name(number)
                    yield replace(case, info=replace(case.info, pseudonym=name, group=name))
            empty = 0 if found else empty + 1
            if empty == MAX_EMPTY_BATCHES:
                break
        raise Refusal(grpc.StatusCode.OUT_OF_RANGE, "no more cases of this selection are found: widen it")

    def _generate(self, query: Query, batch: int) -> list[Case]:
        seed = int(hashlib.sha256(f"{query.key}/{batch}".encode()).hexdigest()[:12], 16)
        names, efs = query.requested(batch)
        with self._lock:
            return synthesize_requested(
                self._prior, self._shared, self._config.synthesis, names, efs, seed, self._config.device
            )


def load_sampler(run: RunFolder) -> OnDemandSampler:
    """The sampler of a finished run.

    Raises:
        UserError: The generator is missing, or is not the prior's.
    """
    path: Path = run.path / "generator.safetensors"
    prior = load_prior(run.prior_path())
    shared = load_shared_generator(path, prior)
    if not shared.styles:
        raise UserError(f"{path} has learnt no vendor: give --no-on-demand")
    sampler = OnDemandSampler(prior, shared, run.config, hashlib.sha256(path.read_bytes()).hexdigest())
    # One heart now: a generator that does not fit must fail at the coordinator, not at the first partner's request.
    vendor = min(shared.styles)
    synthesize_requested(prior, shared, run.config.synthesis, [vendor], [0.5], 0, run.config.device)
    return sampler


def _fraction(key: str, vendor: str) -> float:
    """A number in [0, 1) of a query and a vendor."""
    return int(hashlib.sha256(f"{key}/{vendor}".encode()).hexdigest()[:12], 16) / 16**12

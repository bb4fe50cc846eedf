"""Wire format: what the server requests, what a site may answer, and the check at each end.

    server -> site   {"arrays": the trainable part of generator or segmenter, "config": a `Request`}
    site -> server   {"reply": {"site", "code"}, "arrays": the private update}     no arrays unless the code is "ok"

    server -> site   {"arrays": a trained model, "config": an `EvaluationRequest`}
    site -> server   {"reply": {"site", "code", "form"}, "arrays": sums per vendor}     no form unless the code is "ok"

    server -> site   {"arrays", "rehearsal": a `Request` that is only rehearsed, "planned": the whole study's releases}
    site -> server   {"rehearsal": {"site", "code", "seconds"}, "arrays": zeros}    seconds and zeros only with "ok"

    server -> site   {"arrays", "rehearsed-evaluation": an `EvaluationRequest` that is only rehearsed}
    site -> server   {"rehearsal": {"site", "code", "seconds", "form"}, "arrays": zeros}    form too only with "ok"

Nothing else travels. `pack_reply`, `pack_sums`, `pack_rehearsal_reply` and `pack_rehearsed_sums` are the only ways out
of a site: an allow-list of keys, codes, names, shapes and dtype, so that a count, a loss, a norm or an exception's text
cannot leave by accident.
"""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedcmr.shared.adapters import ADAPTERS
from fedcmr.shared.privacy import Mechanism, Release
from fedcmr.shared.shape import SHAPE_NAMES
from fedcmr.shared.style_statistics import NUM_STEPS

ARRAYS, CONFIG, REPLY = "arrays", "config", "reply"
REHEARSAL, PLANNED = "rehearsal", "planned"
REHEARSED_EVALUATION = "rehearsed-evaluation"
MAX_PLANNED = 16
"""Different releases that a study plans; equal ones are one release of more steps."""

STATISTICS, GRADIENTS, SEGMENTER = "statistics", "gradients", "segmenter"
"""Tasks of a round: statistics of the style vectors, and perhaps of the shape vectors; gradient steps on the generator;
gradient steps on the public segmenter."""
STYLE_MEAN, STYLE_SQUARE = "style_mean", "style_square"
SHAPE_MEAN, SHAPE_SQUARE = "shape_mean", "shape_square"

EJECTION_FRACTION = "ejection_fraction"
PRIVATE, PLAIN = "private", "table"
"""Forms of a table of sums: with noise and charged, or as it is; the site's policy decides."""

OK, INTERNAL_ERROR = "ok", "internal-error"
UNCHARGED_CODES = frozenset(
    {
        "bad-request",
        "prior-mismatch",
        "settings-unreadable",
        "ledger-corrupt",
        "data-unreadable",
        "too-few-patients",
        "noise-below-minimum",
        "delta-above-cap",
        "clip-above-cap",
        "budget-exhausted",
        "privacy-off-not-allowed",
        "code-not-allowed",
        "rounds-exhausted",
        "facts-differ",
        "sample-rate-below-minimum",
        "noise-above-cap",
        "steps-above-cap",
        "views-above-cap",
        "time-above-cap",
        "no-evaluation",
    }
)
"""Answers that a site gives before its ledger is charged. `INTERNAL_ERROR` may follow a charge, and is its answer then,
for ever."""
CODES = UNCHARGED_CODES | {OK, INTERNAL_ERROR}

UNKNOWN_SITE = "unknown"
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

MAX_TTA = 16
"""Rotations at most that a site averages a prediction over."""
MAX_HEADER_BYTES = 1024
"""More than numpy's header of any array here needs."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Wire:
    """The wire form that all requests share: their fields, with kebab-case keys."""

    def _check_types(self) -> None:
        """Raise where a field has another type than it is declared with."""
        for field in fields(self):
            if type(getattr(self, field.name)) is not field.type:
                raise ValueError(f"Expected {field.name} to be {field.type}, got {type(getattr(self, field.name))}.")

    def to_config(self) -> ConfigRecord:
        """The wire form, with kebab-case keys."""
        return ConfigRecord({field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the wire form.

        Raises:
            ValueError: A key is missing or unknown, or a value has another type or is out of range.
        """
        if set(config) != {field.name.replace("_", "-") for field in fields(cls)}:
            raise ValueError("Expected exactly the keys of a request.")
        return cls(**{key.replace("-", "_"): value for key, value in config.items()})


@dataclass(frozen=True)
class Request(_Wire):
    """What the server requests from a site in one round; `configs/default.yaml` explains the settings.

    Attributes:
        task: "statistics" (round 1), "gradients", or "segmenter", which a site of an earlier version does not know and
            refuses as "bad-request".
        run_id: Name of the whole run, the same after a restart: with the round, the key of the site's ledger.
        prior_sha256: The public prior that the trainable part belongs to; in a "segmenter" round the public segmenter.
        adapter: Which part of the generator is trainable, names and shapes; of the segmenter it is always the same.
        private: False only in a study without privacy, which each site's policy must allow.
        max_grad_norm: L2 clip of a patient's gradient; in the statistics task that of a patient's style vector, behind
            which comes the shape vector where `with_shape` says so.
        sample_rate: Poisson sampling over patients; 1 in the statistics task.
        local_steps: Private gradient steps; the steps of the two-step private mean in the statistics task.
        seed: Seed of the views, never of sampling or noise when private.
        sites: The study's sites, a `fedcmr.shared.site_facts.facts_line` each: a site whose own facts are not among
            them refuses before it is charged for an answer that could not be used. Empty where the server does not say.
        with_shape: Whether the statistics are of the patients' shapes too, under the same clip and the same noise.
    """

    task: str
    run_id: str
    server_round: int
    prior_sha256: str
    adapter: str
    private: bool
    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    target_delta: float
    local_steps: int
    learning_rate: float
    num_views: int
    seed: int
    sites: str = ""
    with_shape: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        numbers = (self.noise_multiplier, self.sample_rate, self.max_grad_norm, self.target_delta, self.learning_rate)
        as_statistics = self.sample_rate == 1 and self.local_steps == NUM_STEPS
        if not (
            all(map(math.isfinite, numbers))
            and self.task in (STATISTICS, GRADIENTS, SEGMENTER)
            and (self.task != STATISTICS or as_statistics)
            and (self.task == STATISTICS or not self.with_shape)
            and self.adapter in ADAPTERS
            and re.fullmatch(r"[0-9a-f]{8,64}", self.run_id)
            and self.server_round >= 1
            and self.noise_multiplier >= 0
            and 0 < self.sample_rate <= 1
            and self.max_grad_norm > 0
            and 0 < self.target_delta < 1
            and 1 <= self.local_steps <= 10_000
            and self.learning_rate > 0
            and 1 <= self.num_views <= 4096
            and self.seed >= 0
        ):
            raise ValueError(f"Expected a request within its ranges, got {self}.")

    @property
    def shape_size(self) -> int:
        """Columns of the statistics of shape; 0 where they are not asked for."""
        return len(SHAPE_NAMES) if self.with_shape else 0

    @property
    def mechanism(self) -> Mechanism:
        """What makes an answer private: one subsampled Gaussian mechanism per local step. A site puts in its number."""
        return Mechanism(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            num_steps=self.local_steps,
            max_grad_norm=self.max_grad_norm,
            target_delta=self.target_delta,
            private=self.private,
        )


@dataclass(frozen=True)
class EvaluationRequest(_Wire):
    """What the server requests about a site's test patients: the evaluation of a task's model, given by its arrays.

    Which form the answer has is the site's policy to say, not the server's.

    Attributes:
        task: Which model it is.
        run_id: Name of the whole run, the same after a restart.
        model_sha256: `arrays_sha256` of the model; with the run, the key of the site's ledger of test patients.
        noise_multiplier: Noise of the private form over the bound of one patient's vector.
        target_delta: The delta at which the site counts its budget.
        num_tta: Rotations averaged in every prediction.
        sites: As in `Request`.
    """

    task: str
    run_id: str
    model_sha256: str
    noise_multiplier: float
    target_delta: float
    num_tta: int
    sites: str

    def __post_init__(self) -> None:
        self._check_types()
        if not (
            self.task == EJECTION_FRACTION
            and re.fullmatch(r"[0-9a-f]{8,64}", self.run_id)
            and re.fullmatch(r"[0-9a-f]{64}", self.model_sha256)
            and 0 < self.noise_multiplier < math.inf
            and 0 < self.target_delta < 1
            and 1 <= self.num_tta <= MAX_TTA
        ):
            raise ValueError(f"Expected a request within its ranges, got {self}.")

    @property
    def mechanism(self) -> Mechanism:
        """What makes a private answer private: one Gaussian mechanism over all test patients, each a unit vector."""
        return Mechanism(self.noise_multiplier, 1.0, 1, max_grad_norm=1.0, target_delta=self.target_delta)

    @property
    def ledger_run(self) -> str:
        """The name under which the ledger of test patients keeps the answer: another model is another release."""
        return evaluation_run(self.run_id, self.task, self.model_sha256)


def evaluation_run(run_id: str, task: str, model_sha256: str) -> str:
    """`EvaluationRequest.ledger_run`, from what a report says of the request."""
    return f"{run_id}-{task}-{model_sha256[:16]}"


def pack_request(arrays: Mapping[str, NDArray[np.float32]], request: Request | EvaluationRequest) -> RecordDict:
    """The content of a message to a site."""
    return RecordDict({ARRAYS: encode(arrays), CONFIG: request.to_config()})


def pack_reply(
    site: str, code: str, arrays: Mapping[str, NDArray[np.float32]] | None = None, shapes: Shapes | None = None
) -> RecordDict:
    """The content of a message to the server: the only way out of a site.

    Args:
        site: The site's public name.
        code: One of `CODES`.
        arrays: The private update; exactly when the code is "ok".
        shapes: Its allowed names and shapes.

    Raises:
        ValueError: Anything is not on the allow-list.
    """
    if code not in CODES or not SITE_NAME.fullmatch(site):
        raise ValueError("Expected a site's name and a code of the allow-list.")
    reply = RecordDict({REPLY: ConfigRecord({"site": site, "code": code})})
    if code != OK:
        if arrays is not None:
            raise ValueError("Expected no arrays in a refusal.")
        return reply
    if arrays is None or shapes is None or set(arrays) != set(shapes):
        raise ValueError("Expected exactly the allowed arrays.")
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.shape != tuple(shapes[name]) or not np.isfinite(array).all():
            raise ValueError(f"Expected {name} to be finite float32 {tuple(shapes[name])}.")
    reply[ARRAYS] = encode(arrays)
    return reply


def pack_sums(site: str, form: str, sums: Mapping[str, NDArray[np.float32]], shapes: Shapes) -> RecordDict:
    """The content of the answer to an `EvaluationRequest`: `pack_reply` for a table of sums.

    Args:
        site: The site's public name.
        form: `PRIVATE` or `PLAIN`.
        sums: Vendor -> sums.
        shapes: The vendors that the site declares in public, and the number of sums.

    Raises:
        ValueError: Anything is not on the allow-list.
    """
    if form not in (PRIVATE, PLAIN):
        raise ValueError("Expected a form of the allow-list.")
    reply = pack_reply(site, OK, sums, shapes)
    reply[REPLY] = ConfigRecord({"site": site, "code": OK, "form": form})
    return reply


def arrays_sha256(arrays: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 over the names, shapes and values of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], "<f4")
        digest.update(f"{len(name)} {name} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def update_shapes(
    task: str, trainable: Shapes, num_vendors: int, style_size: int, shape_size: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a task's update: the statistics by vendor, or one delta per trainable array.

    Args:
        task: One of `STATISTICS`, `GRADIENTS` and `SEGMENTER`.
        trainable: Names and shapes of the trainable part.
        num_vendors: Number of vendors that the site declares; rows of the statistics, by the vendors' names.
        style_size: Columns of the statistics of style.
        shape_size: Columns of those of shape; 0 where they are not asked for.
    """
    if task != STATISTICS:
        return dict(trainable)
    of_style, of_shape = (num_vendors, style_size), (num_vendors, shape_size)
    shapes: dict[str, tuple[int, ...]] = {STYLE_MEAN: of_style, STYLE_SQUARE: of_style}
    return shapes | ({SHAPE_MEAN: of_shape, SHAPE_SQUARE: of_shape} if shape_size else {})


def pack_rehearsal(
    arrays: Mapping[str, NDArray[np.float32]], request: Request, planned: Sequence[Release]
) -> RecordDict:
    """The content of a message that rehearses a request.

    It has no record "config": who does not know rehearsals cannot take it for the request itself.

    Args:
        arrays: As in `pack_request`.
        request: What a round would ask.
        planned: All that the study would release, so that the site can say whether its budget lasts to the end.
    """
    columns = ConfigRecord(
        {
            "noise-multiplier": [float(release.noise_multiplier) for release in planned],
            "sample-rate": [float(release.sample_rate) for release in planned],
            "num-steps": [release.num_steps for release in planned],
        }
    )
    return RecordDict({ARRAYS: encode(arrays), REHEARSAL: request.to_config(), PLANNED: columns})


def read_planned(record: Mapping[str, Any]) -> list[Release]:
    """The releases that a study plans, from the wire.

    Raises:
        ValueError: They are not as `pack_rehearsal` writes them, or out of range.
    """
    if set(record) != {"noise-multiplier", "sample-rate", "num-steps"}:
        raise ValueError("Expected exactly the columns of a plan.")
    rows = list(zip(record["noise-multiplier"], record["sample-rate"], record["num-steps"], strict=True))
    if len(rows) > MAX_PLANNED or not all(
        type(noise) is float
        and type(rate) is float
        and type(steps) is int
        and 0 < noise < math.inf
        and 0 < rate <= 1
        and 1 <= steps <= 10_000_000
        for noise, rate, steps in rows
    ):
        raise ValueError("Expected a plan within its ranges.")
    return [Release(*row) for row in rows]


def pack_rehearsal_reply(
    site: str, code: str, shapes: Shapes | None = None, seconds: float | None = None
) -> RecordDict:
    """The answer to a rehearsal: the second way out of a site, and one on which nothing of a patient can travel.

    Args:
        site: The site's public name.
        code: One of `CODES`.
        shapes: With "ok": names and shapes of the update that a round would bring; it is made of zeros here.
        seconds: With "ok": how long the site worked on invented patients.

    Raises:
        ValueError: Anything is not on the allow-list.
    """
    if code not in CODES or not SITE_NAME.fullmatch(site):
        raise ValueError("Expected a site's name and a code of the allow-list.")
    if code != OK:
        return RecordDict({REHEARSAL: ConfigRecord({"site": site, "code": code})})
    if shapes is None or seconds is None or not 0 <= seconds < math.inf:
        raise ValueError("Expected the update's shapes and a time.")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    values = ConfigRecord({"site": site, "code": code, "seconds": round(float(seconds), 1)})
    return RecordDict({REHEARSAL: values, ARRAYS: encode(zeros)})


def pack_rehearsed_evaluation(arrays: Mapping[str, NDArray[np.float32]], request: EvaluationRequest) -> RecordDict:
    """The content of a message that rehearses an evaluation; as in `pack_rehearsal`, it has no record "config".

    Args:
        arrays: A model of the shapes that the study's will have; it need not be any good.
        request: What the run would ask.
    """
    return RecordDict({ARRAYS: encode(arrays), REHEARSED_EVALUATION: request.to_config()})


def pack_rehearsed_sums(site: str, form: str, shapes: Shapes, seconds: float) -> RecordDict:
    """The answer to the rehearsal of an evaluation: `pack_rehearsal_reply` for a table of sums.

    Args:
        site: The site's public name.
        form: `PRIVATE` or `PLAIN`, as the site's policy says.
        shapes: As in `pack_sums`; the sums are zeros here.
        seconds: How long it took on invented patients until the answer would leave.

    Raises:
        ValueError: Anything is not on the allow-list.
    """
    if form not in (PRIVATE, PLAIN):
        raise ValueError("Expected a form of the allow-list.")
    reply = pack_rehearsal_reply(site, OK, shapes, seconds)
    reply[REHEARSAL] = ConfigRecord({**reply.config_records[REHEARSAL], "form": form})
    return reply


def encode(arrays: Mapping[str, NDArray[np.float32]]) -> ArrayRecord:
    """Arrays to the wire, in the order of their names."""
    return ArrayRecord({name: Array(np.ascontiguousarray(arrays[name], np.float32)) for name in sorted(arrays)})


def decode(record: Mapping[str, Any], shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    """Arrays from the wire, each checked before a byte of it is interpreted.

    An `Array`'s metadata may lie about its payload and the payload's own header may claim any size, so both are
    compared with what is expected, and the payload must be exactly as long as that.

    Raises:
        ValueError: Its text is a reason code: "names", "dtype", "shape", "payload" or "non-finite".
    """
    if set(record) != set(shapes):
        raise ValueError("names")
    arrays = {}
    for name, shape in shapes.items():
        array = record[name]
        if not isinstance(array, Array) or array.dtype != "float32" or array.stype != "numpy.ndarray":
            raise ValueError("dtype")
        if tuple(array.shape) != tuple(shape):
            raise ValueError("shape")
        arrays[name] = _payload(array.data, tuple(shape))
        if not np.isfinite(arrays[name]).all():
            raise ValueError("non-finite")
    return arrays


def _payload(data: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A .npy file of float32 in memory, which must be exactly one array of this shape."""
    num_bytes = 4 * math.prod(shape)
    if not num_bytes < len(data) <= num_bytes + MAX_HEADER_BYTES:
        raise ValueError("payload")
    header = io.BytesIO(data[:MAX_HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(header)
        claimed_shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
    except Exception:
        raise ValueError("payload") from None
    offset = header.tell()
    if (version, claimed_shape, fortran_order, dtype) != ((1, 0), shape, False, np.dtype("<f4")):
        raise ValueError("payload")
    if len(data) - offset != num_bytes:
        raise ValueError("payload")
    return np.frombuffer(data, "<f4", offset=offset).reshape(shape).astype(np.float32)

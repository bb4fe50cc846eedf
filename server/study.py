"""The course of a study, as a table: every stage in order, what it does, and what it needs.

Every stage is done once: what is finished is read back, so that an interrupted study resumes where it stopped. A
simulation puts its own stages before these (`fedcmr.simulations.run`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedcmr.server.dataset.datasheet import study_facts
from fedcmr.server.dataset.making import keep_making
from fedcmr.server.dataset.writer import write_release
from fedcmr.server.evaluation.tables import predict_the_mean
from fedcmr.server.experiments import combined_ef, federated_segmenter, fidelity
from fedcmr.server.experiments.cross_vendor import train_cross_vendor
from fedcmr.server.experiments.models import (
    REGRESSOR_STAGE,
    check_test_patients,
    main_stage_of,
    save_predictions,
    test_sets,
    train_models,
)
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.federation.evaluation import STAGE, evaluate_at_sites
from fedcmr.server.federation.federate import federate
from fedcmr.server.federation.outcome import origin, privacy_spent
from fedcmr.server.federation.strategy import Grid
from fedcmr.server.generation.synthesis import SharedGenerator, load_shared_generator, synthesize
from fedcmr.server.report.collect import write_report
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config
from fedcmr.server.tasks.registry import tasks_of
from fedcmr.server.tasks.segmentation.training import measured_ef
from fedcmr.shared.case import Case, load_cases, read_index
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter


class Study:
    """A study: its run folder with its settings, which were checked when it was opened, and the way to its sites.

    Attributes:
        run: The folder.
        config: Its settings.

    Raises:
        UserError: The settings name a task that there is not.
    """

    def __init__(self, run: RunFolder, grid: Grid | None = None):
        tasks_of(run.config)
        self.run, self._grid = run, grid

    @property
    def config(self) -> Config:
        """The settings of the run folder."""
        return self.run.config

    @property
    def grid(self) -> Grid:
        """Flower's connection to the sites; only stages within the ServerApp have it."""
        assert self._grid is not None, "a stage that asks sites runs in the ServerApp"
        return self._grid

    @cached_property
    def prior(self) -> Prior:
        """The public prior.

        Raises:
            UserError: It cannot be read.
        """
        return load_prior(self.run.prior_path())

    @cached_property
    def shared(self) -> SharedGenerator:
        """What the federation published."""
        return load_shared_generator(self.run.path / "generator.safetensors", self.prior)


def always(config: Config) -> bool:
    """Whether a stage that no setting switches off is wanted."""
    return True


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: Name in `metrics.jsonl` and in the report's timing.
        what: What it does, for the reader of a command's help or summary.
        do: Function that does it.
        needs: Stages that come before it, where they are in the same table and wanted.
        wanted: Whether the settings ask for it.
        has_parts: Whether it is a group of stages, each recorded under its own name; the group itself is not recorded.
    """

    name: str
    what: str
    do: Callable[[Study], None]
    needs: tuple[str, ...] = ()
    wanted: Callable[[Config], bool] = always
    has_parts: bool = False


def run_stages(study: Study, stages: Sequence[Stage], until: str | None = None) -> bool:
    """Do what is wanted and not done yet, in the order of the table.

    Args:
        study: The study.
        stages: The table.
        until: The last stage to do; None or a stage of another table for all of these.

    Returns:
        Whether `until` was reached.

    Raises:
        UserError: A stage that another one needs is not done, or what a stage raises.
    """
    wanted = {stage.name: stage for stage in stages if stage.wanted(study.config)}
    for stage in stages:
        if stage.name in wanted:
            missing = [
                name
                for name in stage.needs
                if name in wanted and not wanted[name].has_parts and not study.run.is_done(name)
            ]
            if missing:
                raise UserError(f"{study.run.path}: {stage.name} needs {', '.join(missing)}, which is not done")
            if stage.has_parts:
                stage.do(study)
            else:
                with study.run.stage(stage.name) as to_do:
                    if to_do:
                        stage.do(study)
        if stage.name == until:
            return True
    return False


def seconds_of_stages(run: RunFolder, stages: Sequence[Stage]) -> dict[str, float]:
    """Seconds of every finished stage in the order of the table; what is in no table of the server's comes first."""
    places = {stage.name: number for number, stage in enumerate(stages)}

    def place(name: str) -> int:
        own = main_stage_of(name)
        return next((places[part] for part in (own, own.rpartition("/")[0]) if part in places), -1)

    recorded = run.stage_seconds()
    return {name: recorded[name] for name in sorted(recorded, key=place)}


def _federation(study: Study) -> None:
    federate(study.grid, study.run, study.prior)


def _synthesis(study: Study) -> None:
    """Sample the synthetic data set, measure what the images show, and write it with labels and datasheet."""
    run, config, shared = study.run, study.config, study.shared
    check_test_patients(run)  # without them the study could not end, so nothing is sampled
    synthetic = synthesize(study.prior, shared, config.synthesis, sorted(shared.styles), config.seed, config.device)
    measured = measured_ef(load_segmenter().to(pick_device(config.device)), synthetic.cases)
    generator = run.path / "generator.safetensors"
    facts = study_facts(run.path.resolve().name, config, study.prior, generator, privacy_spent(run), *origin(run))
    keep_making(facts, run.path)
    write_release(
        run.path / "synthetic",
        synthetic.cases,
        synthetic.requested_efs,
        measured,
        facts,
        config.synthesis.dicom,
        config.synthesis.nifti,
        config.synthesis.nnunet,
    )


def _main_models(study: Study) -> None:
    train_models(study.run, MAIN_MODEL, lambda: load_cases(study.run.path / "synthetic"))


def _combined_ef(study: Study) -> None:
    """Choose how much of an ejection fraction is the segmentation's, on hearts that no network was trained on."""
    config, vendors = study.config, sorted(study.shared.styles)
    few = replace(config.synthesis, num_cases=min(combined_ef.NUM_CASES, config.synthesis.num_cases))
    seed, doing = config.seed + combined_ef.SEED_OFFSET, "generating hearts to weigh two networks on"
    hearts = synthesize(study.prior, study.shared, few, vendors, seed, config.device, doing)
    combined_ef.choose_weight(study.run, hearts.cases)


def _fidelity(study: Study) -> None:
    fidelity.compare_with_test_patients(study.run, study.prior)


def _federated_evaluation(study: Study) -> None:
    evaluate_at_sites(study.grid, study.run)


def _federated_segmenter(study: Study) -> None:
    federated_segmenter.test_segmenters(study.run)


def _predict_the_mean(study: Study) -> None:
    efs = [info.ef for info in read_index(study.run.path / "synthetic")]
    held_out = test_sets(study.run)
    values = {
        name: {"true": [case.info.ef for case in cases], "predicted": predict_the_mean(efs, len(cases)).tolist()}
        for name, cases in held_out
    }
    save_predictions(study.run, "predict_the_mean", held_out, values)


def _prior_only(study: Study) -> None:
    def make_cases() -> list[Case]:
        config, vendors = study.config, sorted(study.shared.styles)
        doing = "rendering with the public prior only"
        return synthesize(study.prior, None, config.synthesis, vendors, config.seed, config.device, doing).cases

    train_models(study.run, "prior_only", make_cases)


def _cross_vendor(study: Study) -> None:
    train_cross_vendor(study.run, "synthetic", load_cases(study.run.path / "synthetic"))


def report(study: Study) -> None:
    """Write the report of what the run folder holds, with the time of every stage that is done."""
    write_report(study.run, test_sets(study.run), seconds_of_stages(study.run, STAGES))


STAGES = (
    Stage(
        "federation", "the sites fine-tune the public prior in private rounds", _federation, ("prepare", "baselines")
    ),
    Stage("synthesis", "the synthetic data set, with labels and datasheet", _synthesis, ("federation",)),
    Stage(
        REGRESSOR_STAGE,
        "every task's network is trained on synthetic hearts alone",
        _main_models,
        ("synthesis",),
        has_parts=True,
    ),
    Stage(
        fidelity.STAGE,
        "the synthetic hearts next to the test patients: images and anatomy",
        _fidelity,
        ("synthesis",),
        lambda config: config.evaluation.fidelity,
    ),
    Stage(
        combined_ef.STAGE,
        "how much of an ejection fraction is the segmentation's, chosen on other synthetic hearts",
        _combined_ef,
        ("regressor",),
        lambda config: "segmentation" in config.tasks,
    ),
    Stage(
        STAGE,
        "the sites evaluate it on test patients of their own",
        _federated_evaluation,
        ("regressor",),
        lambda config: config.evaluation.federated,
    ),
    Stage(
        federated_segmenter.STAGE,
        "the public segmenter as it is and as the sites have tuned it, tested beside the study's own",
        _federated_segmenter,
        ("federation",),
        lambda config: config.federation.segmenter_rounds > 0,
    ),
    Stage(
        "predict_the_mean",
        "baseline: the mean of the training set for everybody",
        _predict_the_mean,
        ("synthesis",),
        lambda config: "predict_the_mean" in config.evaluation.baselines,
    ),
    Stage(
        "prior_only",
        "baseline: every task's network trained on hearts of the public prior",
        _prior_only,
        ("federation",),
        lambda config: "prior_only" in config.evaluation.baselines,
        has_parts=True,
    ),
    Stage(
        "matrix/synthetic",
        "trained on each vendor alone and on all but one",
        _cross_vendor,
        ("synthesis",),
        lambda config: "synthetic" in config.evaluation.cross_vendor,
        has_parts=True,
    ),
    Stage("report", "tables, figures and the report for a browser", report, ("regressor",)),
)
"""What the ServerApp does, on one machine as in a deployment."""

"""From the shared generator to the report: synthesis, the regressor, the server's baselines, evaluation.

Every stage is done once: what is finished is read back, so that an interrupted study goes on where it stopped.
"""

from fedcmr.server.dataset.datasheet import study_facts
from fedcmr.server.dataset.writer import write_release
from fedcmr.server.evaluation.tables import predict_the_mean
from fedcmr.server.experiments.cross_vendor import train_cross_vendor
from fedcmr.server.experiments.models import save_predictions, test_sets, train_and_predict
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.federation.evaluation import STAGE, evaluate_at_sites
from fedcmr.server.federation.outcome import origin, privacy_spent
from fedcmr.server.federation.strategy import Grid
from fedcmr.server.generation.synthesis import SharedGenerator, load_shared_generator, synthesize
from fedcmr.server.report.collect import write_report
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config
from fedcmr.server.tasks.segmentation.training import measured_ef
from fedcmr.shared.case import load_cases
from fedcmr.shared.device import pick_device
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.tasks.segmentation.network import load_segmenter


def finish_study(run: RunFolder, config: Config, prior: Prior, grid: Grid) -> None:
    """Everything after the last round: synthesis, regressor, the sites' answers, the server's baselines, the report.

    Raises:
        UserError: There are no test patients, or a file of an earlier stage cannot be read.
    """
    test_sets(run)
    shared = load_shared_generator(run.path / "generator.safetensors", prior)
    with run.stage("synthesis") as to_do:
        if to_do:
            _release(run, config, prior, shared)
    with run.stage("regressor") as to_do:
        if to_do:
            train_and_predict(run, config, MAIN_MODEL, load_cases(run.path / "synthetic"))
    if config.evaluation.federated:
        with run.stage(STAGE) as to_do:
            if to_do:
                evaluate_at_sites(grid, run, config)
    if "predict_the_mean" in config.evaluation.baselines:
        with run.stage("predict_the_mean") as to_do:
            if to_do:
                efs = [case.info.ef for case in load_cases(run.path / "synthetic")]
                held_out = test_sets(run)
                answers = {name: predict_the_mean(efs, len(cases)) for name, cases in held_out}
                save_predictions(run, "predict_the_mean", held_out, answers)
    if "prior_only" in config.evaluation.baselines:
        with run.stage("prior_only") as to_do:
            if to_do:
                vendors = sorted(shared.styles)
                synthetic = synthesize(
                    prior, None, config.synthesis, vendors, config.seed, config.device, "painting with the prior alone"
                )
                train_and_predict(run, config, "prior_only", synthetic.cases)
    if "synthetic" in config.evaluation.cross_vendor:
        train_cross_vendor(run, config, "synthetic", load_cases(run.path / "synthetic"))
    with run.stage("report") as to_do:
        if to_do:
            write_report(run, config, test_sets(run))


def _release(run: RunFolder, config: Config, prior: Prior, shared: SharedGenerator) -> None:
    """Sample the synthetic data set, measure what the pictures show, and write it with labels and datasheet."""
    synthetic = synthesize(prior, shared, config.synthesis, sorted(shared.styles), config.seed, config.device)
    measured = measured_ef(load_segmenter().to(pick_device(config.device)), synthetic.cases)
    generator = run.path / "generator.safetensors"
    facts = study_facts(run.path.resolve().name, config, prior, generator, privacy_spent(run), *origin(run))
    write_release(
        run.path / "synthetic",
        synthetic.cases,
        synthetic.requested_efs,
        measured,
        facts,
        config.synthesis.dicom,
        config.synthesis.nifti,
    )

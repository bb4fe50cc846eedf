"""ServerApp: the federation, then synthesis, training, evaluation and report, in one run folder."""

import logging
import shlex
from pathlib import Path

from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fedcmr.server.rehearsal.rehearsal import rehearse
from fedcmr.server.run_folder import CONFIG_NAME, RunFolder, load_run, open_run
from fedcmr.server.settings import load
from fedcmr.server.study import STAGES, Study, run_stages
from fedcmr.shared.errors import UserError

# Opacus, once imported, has the root logger print every debug line a second time; Flower's own handler stays.
logging.getLogger("flwr").propagate = False

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the study whose folder the run config names.

    Raises:
        UserError: The folder or a setting is not as expected, or no usable replies came from the sites.
    """
    run = open_run_folder(context.run_config)
    run.lock()
    study = Study(run, grid)
    if context.run_config.get("rehearsal", False):
        rehearse(study.grid, run, study.prior)
        return
    run_stages(study, STAGES, str(context.run_config.get("until", "")) or None)


def open_run_folder(run_config: UserConfig) -> RunFolder:
    """The run folder that `run-dir` names; `config`, `overrides` and `num-server-rounds` must match it."""
    path = Path(str(run_config.get("run-dir", "")))
    if not path.is_absolute():
        raise UserError(f"Expected run-dir to be the absolute path of a run folder, got {str(path)!r}.")
    overrides = shlex.split(str(run_config.get("overrides", "")))
    if num_rounds := run_config.get("num-server-rounds", 0):
        overrides.append(f"federation.num_rounds={num_rounds}")
    config = str(run_config.get("config", ""))
    if config or overrides:
        return open_run(path, load(config or path / CONFIG_NAME, overrides))
    return load_run(path)

"""TensorBoard's hyperparameters, read back; wandb with a fake module that keeps what it is told."""

import json
import sys
import types

import pytest
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from rlhfjax import metrics, provenance, rerun, trackers
from rlhfjax.config import write_json
from rlhfjax.errors import ConfigError, Interrupted, Preempted
from tests.test_metrics import events

RECIPE = {
    "stages": ["tokenizer", "sft", "last"],
    "tokenizer": {"stage": "tokenizer"},
    "sft": {"stage": "sft", "log": {"wandb": "ours"}, "optim": {"learning_rate": 0.1}},
    "last": {"stage": "ppo", "log": {"wandb": "ours"}},
}
FOLDERS = {"tokenizer": "00_tokenizer", "sft": "01_sft", "last": "02_last"}


@pytest.fixture
def run(tmp_path):
    """The workdir of a recipe whose stages have not begun."""
    workdir = tmp_path / "sweep" / "lr=0.1"
    for name, folder in FOLDERS.items():
        (workdir / folder).mkdir(parents=True)
        write_json(workdir / folder / "config.json", RECIPE[name])
    write_json(workdir / "config.json", RECIPE)
    provenance.record(workdir, seeds={"sft": 3})
    return workdir


class Fake:
    """wandb, as far as it is used."""

    def __init__(self):
        self.starts, self.logged, self.steps, self.exits = [], [], {}, []
        self.error = None

    def init(self, **options):
        if self.error:
            raise self.error
        self.starts.append(options)
        return self

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, name, step_metric=None, hidden=None):
        if step_metric:
            self.steps[name] = step_metric

    def finish(self, exit_code):
        self.exits.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    return fake


def train(folder, resume=None, steps=(1, 2), name="sft/loss"):
    with metrics.Writer(folder, resume, tensorboard=False, wandb="ours") as writer:
        for step in steps:
            writer.write(step, {name: 1 / step})


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_wandb_that_is_not_installed_is_one_clear_error(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[wandb\]'"):
        metrics.Writer(tmp_path / "w", wandb="ours")
    assert not (tmp_path / "w").exists()


def test_wandb_that_does_not_start_is_one_clear_error_and_leaves_no_id(run, wandb):
    wandb.error = RuntimeError("no API key\nconfigured")
    with pytest.raises(ConfigError, match=r"^log\.wandb=ours: .*no API key"):
        metrics.Writer(run / "01_sft", wandb="ours")
    assert not (run / trackers.ID).exists()


def test_a_recipe_is_one_wandb_run_with_a_step_per_stage(run, wandb):
    train(run / "01_sft")
    moved = run.rename(run.parent / "moved")
    train(moved / "01_sft", resume=1, steps=(2, 3))
    train(moved / "02_last", name="ppo/reward")
    ids = {start["id"] for start in wandb.starts}
    assert ids == {(moved / trackers.ID).read_text().strip()}
    assert {start["resume"] for start in wandb.starts} == {"allow"}
    # Two stages of one kind would share the names of its metrics: they are those of the stages.
    assert wandb.steps == {"sft/*": "sft/step", "last/*": "last/step"}
    sft = [row for row in wandb.logged if "sft/step" in row]
    assert [row["sft/step"] for row in sft] == [1, 2, 2, 3]
    assert wandb.logged[-1] == {"last/step": 2, "last/reward": 0.5}


def test_wandb_knows_name_config_and_provenance(run, wandb):
    train(run / "01_sft")
    start = wandb.starts[0]
    assert start["name"] == "lr=0.1" and "group" not in start
    assert start["config"]["sft"]["optim"] == {"learning_rate": 0.1}
    assert start["config"]["provenance"] == provenance.read(run)[0]
    assert start["dir"] == str(run)


def test_runs_of_a_sweep_are_a_group_in_wandb(run, wandb, monkeypatch):
    write_json(run.parent / trackers.SWEEP, {"runs": ["lr=0.1"]})
    train(run / "01_sft")
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    train(run / "01_sft")
    assert wandb.starts[0]["group"] == "sweep"
    assert {"name", "group"}.isdisjoint(wandb.starts[1])


@pytest.mark.parametrize(
    ("error", "code"), [(ZeroDivisionError, 1), (Preempted, 0), (Interrupted, 0)]
)
def test_a_run_that_fails_is_marked_in_wandb(run, wandb, error, code):
    with (
        pytest.raises(error),
        metrics.Writer(run / "01_sft", tensorboard=False, wandb="ours"),
    ):
        raise error
    assert wandb.exits == [code]


def finish(folder, step, values):
    with metrics.Writer(folder, tensorboard=False) as writer:
        writer.write(step, values)
    write_json(folder / "done.json", {"metrics": {}})


def test_finished_stages_are_logged_to_wandb_from_their_files(run, wandb):
    finish(run / "00_tokenizer", 0, {"tokenizer/vocab_size": 300.0})
    train(run / "01_sft", steps=(1,))
    tokenizer = {"tokenizer/step": 0, "tokenizer/vocab_size": 300.0}
    assert wandb.logged == [tokenizer, {"sft/step": 1, "sft/loss": 1.0}]
    finish(run / "02_last", 5, {"ppo/reward": 2.0})
    trackers.log_finished_stage(run / "02_last")
    assert wandb.logged[2:] == [{"last/step": 5, "last/reward": 2.0}]


def test_stages_that_run_again_get_a_new_wandb_run(run, wandb):
    finish(run / "00_tokenizer", 0, {"tokenizer/vocab_size": 300.0})
    train(run / "01_sft")
    rerun._move_away([run / "01_sft"], run)
    (run / "01_sft").mkdir()
    train(run / "01_sft", steps=(7,))
    first, second = (start["id"] for start in wandb.starts)
    assert first != second
    assert (run / "previous" / "1" / trackers.ID).read_text().strip() == first
    assert [next(iter(row)) for row in wandb.logged[-2:]] == [
        "tokenizer/step",
        "sft/step",
    ]


def test_no_stage_with_a_project_means_no_wandb(run, wandb):
    config = json.loads(json.dumps(RECIPE).replace("ours", ""))
    write_json(run / "config.json", config)
    finish(run / "00_tokenizer", 0, {"tokenizer/vocab_size": 300.0})
    trackers.log_finished_stage(run / "00_tokenizer")
    assert wandb.starts == []


def session(folder):
    """Returns the hyperparameters in a workdir's event files."""
    found = {}
    for event in events(folder / "tb"):
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                content = value.metadata.plugin_data.content
                start = HParamsPluginData.FromString(content).session_start_info
                assert not found  # once
                found = {
                    name: getattr(value, value.WhichOneof("kind"))
                    for name, value in start.hparams.items()
                }
    return found


def test_tensorboard_has_the_options_and_where_they_come_from(run):
    folder = run / "01_sft"
    provenance.record(folder, seeds={"sft": 3})
    with metrics.Writer(folder) as writer:
        writer.write(1, {"sft/loss": 0.5})
    metrics.Writer(folder, resume_step=1).close()
    found = session(folder)
    assert found["optim.learning_rate"] == 0.1 and found["stage"] == "sft"
    start = provenance.read(folder)[0]
    assert found["provenance.versions.jax"] == start["versions"]["jax"]
    assert found["provenance.hardware.devices"] == start["hardware"]["devices"]
    assert found["provenance.commit"] == start["commit"]
    texts = [
        value.tensor.string_val[0].decode()
        for event in events(folder / "tb")
        for value in event.summary.value
        if value.tag.startswith("command")
    ]
    assert texts == [f"    {start['command']}"]

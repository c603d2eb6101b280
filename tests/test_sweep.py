"""Sweeps: what a file's sweep(add) expands to, how runs are run and stopped, and what is collected of them."""

import csv
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhfjax import main as command_line
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError, Preempted
from rlhfjax.report import figures
from rlhfjax.report import sweep as results
from rlhfjax.sweep import chain, command, grid, pool, product, seeds, zipped
from rlhfjax.sweep.expand import expand, name_of

ROOT = Path(__file__).parent.parent
FILE = """
from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config
from rlhfjax.sweep import *

def get_config(arg=None):
    arg = parse_arg(arg, vocab=270, seed=0)
    source = {{"spec": "jsonl:{data}/train.jsonl", "kind": "messages", "split": "all"}}
    return stage_config("tokenizer", sources=(source,), vocab_size=arg.vocab)

def sweep(add):
{body}
"""


def write(folder: Path, *lines: str, data: object = "nowhere") -> str:
    file = folder / "tokenizer.py"
    file.write_text(FILE.format(data=data, body="".join(f"    {line}\n" for line in lines)))
    return str(file)


def test_combinators_by_hand():
    a, b = grid("a", 1, 2), grid("b", "x", "y")
    assert product(a, b) == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert product() == [{}]
    assert zipped(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert chain(a, b) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]
    assert seeds(2) == [{"arg.seed": 0}, {"arg.seed": 1}]
    assert product(zipped(a, b), seeds(2, "seed"))[1] == {"a": 1, "b": "x", "seed": 1}
    with pytest.raises(ConfigError, match="lengths 2, 3"):
        zipped(a, seeds(3))
    with pytest.raises(ConfigError, match="'a' is set by two"):
        product(a, b, a)


def test_a_runs_name_says_its_overrides_and_fits_a_path():
    assert name_of({"ppo.kl.coefficient": 0.05, "arg.seed": 1}) == "ppo.kl.coefficient=0.05,seed=1"
    assert name_of({"a": True, "b": (1, 2)}) == f"a=true,b=-1,-2--{_hash('a=true,b=(1, 2)')}"
    assert name_of({}) == "base"
    slashes, dots = name_of({"init_from": "runs/a"}), name_of({"init_from": "runs-a"})
    assert "/" not in slashes and slashes != dots
    long = [name_of({"x": "y" * 500 + end}) for end in "ab"]
    assert long[0] != long[1] and all(len(name) < 150 for name in long)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def test_a_command_leads_to_the_config_that_was_checked(tmp_path, monkeypatch):
    """What `rlhfjax COMMAND` makes of each run's words is the config in `Run.config`, value for value."""
    from rlhfjax import recipe

    seen = []
    monkeypatch.setattr(recipe, "run", lambda config, workdir: seen.append((to_dict(config), workdir)))
    monkeypatch.setattr(command_line, "report", lambda fv: None)
    file = tmp_path / "swept.py"
    file.write_text(
        "from rlhfjax.sweep import *\n"
        f"exec(open({str(ROOT / 'experiments/quickstart/recipe.py')!r}).read().partition('def sweep')[0])\n"
        "def sweep(add):\n"
        "    for one in product(grid('ppo.kl.coefficient', 1, 1e-05), grid('sft.log.tensorboard', False),\n"
        "                       grid('reward.init_from', 'elsewhere'), grid('ppo.steps', 7), seeds(2)): add(one)\n"
    )
    runs = expand(f"{file}:size=smoke", tmp_path, {"pretrain.model.n_kv_heads": 1})
    assert len(runs) == 4 and len({run.name for run in runs}) == 4
    for run in runs:
        command_line.main(["rlhfjax", *run.command])
        assert seen.pop() == (run.config, run.workdir)
    assert runs[0].config["ppo"]["kl"]["coefficient"] == 1.0 and runs[2].config["ppo"]["kl"]["coefficient"] == 1e-5
    assert runs[1].config["sft"]["seed"] == runs[1].config["ppo"]["seed"] == 1
    assert runs[0].config["pretrain"]["model"]["d_model"] == 64  # size=smoke stays
    assert runs[0].config["pretrain"]["model"]["n_kv_heads"] == 1


REFUSED = [
    ("add({'vocab': 3})", "has no option 'vocab'"),
    ("add({'vocab_size.x': 3})", "has no option 'vocab_size.x'"),
    ("add({'vocab_size': 'many'})", "vocab_size='many' is not of type int"),
    ("add({'vocab_size': None})", "vocab_size=None: expected a number"),
    ("add({'model_type': 'bytes'})", "model_type='bytes': expected one of 'bpe'"),
    ("add({'arg.bogus': 3})", "config argument 'bogus' is unknown"),
    ("add({'arg.seed': 3})", "this argument is what the sweep varies"),
    ("add({'vocab_size': 271}), add({'vocab_size': 271})", "adds vocab_size=271 twice"),
    ("1 / 0", "tokenizer.py:12: ZeroDivisionError"),
    ("pass", "added nothing"),
]


@pytest.mark.parametrize(("line", "said"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_sweep_that_cannot_be_meant(line, said, tmp_path):
    with pytest.raises(ConfigError) as caught:
        expand(write(tmp_path, line) + ":seed=1", tmp_path / "sweep")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_given_option_that_is_swept_and_a_file_without_a_sweep(tmp_path):
    file = write(tmp_path, "add({'vocab_size': 280})")
    with pytest.raises(ConfigError, match="this option is what the sweep varies"):
        expand(file, tmp_path, {"vocab_size": 3})
    with pytest.raises(ConfigError, match="it has no sweep"):
        expand(f"{ROOT}/experiments/rloo2024/rloo.py", tmp_path)


def test_a_changed_experiment_is_not_mixed_with_finished_runs(tmp_path):
    file = write(tmp_path, "add({'arg.seed': 1})")
    (run,) = expand(file, tmp_path / "sweep")
    run.workdir.mkdir(parents=True)
    (run.workdir / "config.json").write_text(json.dumps(run.config))
    (run.workdir / "done.json").write_text("{}")
    assert expand(file, tmp_path / "sweep")[0].finished
    Path(file).write_text(Path(file).read_text().replace("vocab=270", "vocab=280"))
    with pytest.raises(ConfigError, match=r"seed=1 was started with another config \(vocab_size: 270 -> 280\)"):
        expand(file, tmp_path / "sweep")


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{code}"]


def test_at_most_so_many_at_a_time_and_a_failure_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POLL", 0.02)
    mark = f"p = {str(tmp_path)!r} + '/live' + str(os.getpid()); open(p, 'w'); time.sleep(0.2)\n"
    count = "print(len([x for x in os.listdir(%r) if x.startswith('live')])); os.remove(p)" % str(tmp_path)  # noqa: UP031
    commands = {str(i): python(mark + count + ("; sys.exit(3)" if i == 1 else "")) for i in range(5)}
    said = []
    codes = pool.run_all(commands, tmp_path, parallel=2, say=said.append)
    assert codes == {"0": 0, "1": 3, "2": 0, "3": 0, "4": 0}
    alive = [int(pool.log_of(tmp_path, name).read_text()) for name in commands]
    assert max(alive) == 2 and len(said) == 5
    assert command.why(codes, tmp_path, ["1"]) == [f"1 (exit code 3: {alive[1]})"]


def test_a_preempted_run_starts_again(tmp_path):
    once = f"p = {str(tmp_path / 'been')!r}\nif not os.path.exists(p): open(p, 'w'); sys.exit(75)"
    assert pool.run_all({"a": python(once)}, tmp_path, say=lambda _: None) == {"a": 0}


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_lets_runs_save_and_starts_no_more(number, raised, tmp_path):
    saves = (
        "def save(*_): time.sleep(0.3); open(%r + '/saved', 'a').write('x'); sys.exit(75)\n"  # noqa: UP031
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)" % str(tmp_path)
    )

    def stop():
        while not all("ready" in log.read_text() for log in [pool.log_of(tmp_path, "a"), pool.log_of(tmp_path, "b")]):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    for name in "ab":
        (tmp_path / "logs").mkdir(exist_ok=True)
        pool.log_of(tmp_path, name).touch()
    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(raised):
        pool.run_all(dict.fromkeys("abc", python(saves)), tmp_path, parallel=2, say=lambda _: None)
    thread.join()
    assert (tmp_path / "saved").read_text() == "xx"
    assert not pool.log_of(tmp_path, "c").exists()
    assert signal.getsignal(number) is before


def test_a_second_sweep_waits_for_the_processes_of_a_killed_one(tmp_path):
    """The lock is held by the runs themselves: a sweep that was killed outright leaves nobody's run to be doubled."""
    code = (
        "import sys; from pathlib import Path; from rlhfjax.sweep import pool\n"
        "pool.run_all({'a': ['sh', '-c', 'echo $$; exec sleep 600']}, Path(sys.argv[1]), say=print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    log = pool.log_of(tmp_path, "a")
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    try:
        with pytest.raises(ConfigError, match="a sweep is running here"):
            pool.run_all({"b": ["true"]}, tmp_path)
    finally:
        os.kill(int(log.read_text()), signal.SIGKILL)


def test_a_sweep_from_the_command_line(conversations, tmp_path, capsys):
    """Real processes: three settings, one of which cannot work; then the same again, which runs that one only."""
    lines = "for one in chain(product(grid('vocab_size', 300, 320), seeds(1)), grid('vocab_size', 9999)): add(one)"
    file = write(tmp_path, lines, data=conversations)
    workdir = tmp_path / "sweep"
    args = ["rlhfjax", "sweep", f"--config={file}", f"--workdir={workdir}", "--parallel=2"]
    command_line.main([*args, "--dry_run"])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and all(" -m rlhfjax train --config=" in line for line in out) and not workdir.exists()
    with pytest.raises(SystemExit) as caught:
        command_line.main(args)
    err = capsys.readouterr().err
    assert caught.value.code == 1 and err.startswith(
        "rlhfjax: 1 of 3 runs failed: vocab_size=9999 (exit code 2: rlhfjax:"
    )
    assert err.count("\n") == 1
    with (workdir / "sweep.csv").open() as f:
        rows = {row["run"]: row for row in csv.DictReader(f)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "vocab_size=320,seed=0": "done",
        "vocab_size=300,seed=0": "done",
        "vocab_size=9999": "unfinished",
    }
    assert float(rows["vocab_size=300,seed=0"]["vocab_size"]) == 300
    before = (workdir / "vocab_size=300,seed=0" / "done.json").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        command_line.main(args)
    assert "3 runs, 2 of them finished" in capsys.readouterr().out
    assert (workdir / "vocab_size=300,seed=0" / "done.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("local", f"{sys.executable} -m"),
        ("slurm --gpus_per_node=8", f"{sys.executable} -m launch.slurm submit --wait --name={{}} --gpus_per_node=8 --"),
        ("tpu --zone=z --", f"{sys.executable} -m launch.tpu run --name={{}} --zone=z --"),
        ("gke --name=x-{name}", f"{sys.executable} -m launch.gke run --name={{}} --name=x-{{}} --"),
        ("ssh --hosts='a b'", f"{sys.executable} -m launch.ssh run --name={{}} '--hosts=a b' --"),
        ("env A=1 {name}", "env A=1 {}"),
    ],
)
def test_a_launcher_takes_the_runs_command_after_its_own(launcher, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = write(tmp_path, "add({'vocab_size': 280})")
    args = ["rlhfjax", "sweep", f"--config={file}", f"--workdir={tmp_path}", "--dry_run"]
    command_line.main([*args, f"--launcher={launcher}"])
    assert capsys.readouterr().out == (
        words.replace("{}", "vocab_size=280")
        + f" rlhfjax train --config={file} --workdir={tmp_path}/vocab_size=280 --config.vocab_size=280\n"
    )


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("slrum --nodes=2", "expected local, tpu, gke, slurm, ssh, or a command that is installed"),
        ("", "expected local, tpu, gke, slurm, ssh, or a command that is installed"),
        ("env 'a", "no closing quotation"),
        ("tpu --zone=z", "launch/tpu.py is not in this folder; expected to run in the repository's"),
    ],
)
def test_a_launcher_that_is_none_is_one_line(launcher, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, "add({'vocab_size': 280})")
    with pytest.raises(SystemExit) as caught:
        command_line.main(
            ["rlhfjax", "sweep", f"--config={file}", "--workdir=a", f"--launcher={launcher}", "--dry_run"]
        )
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and said in err


def test_every_launcher_is_one_that_waits():
    """launch/ takes the words, and asks for what is missing; a folder's file that is no launcher has no `act`."""
    for name, words in command.WAITING.items():
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{name}", *words, "--", "true"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stderr == "launch: --name is required\n"
    files = {file.stem for file in (ROOT / "launch").glob("*.py") if "def act(" in file.read_text()}
    assert files == set(command.WAITING)


def made_up(seed: int, kl: float, value: float | None, status: str = "done") -> results.Result:
    metrics = {} if value is None else {"ppo/gold": value, "ppo/kl": 2 * value}
    return results.Result(
        f"kl={kl},seed={seed}", {"ppo.kl": kl}, {"arg.seed": seed}, status, metrics, ("ppo/gold",) if metrics else ()
    )


RESULTS = [
    made_up(0, 0.1, 1.0),
    made_up(1, 0.1, 2.0),
    made_up(2, 0.1, 6.0),
    made_up(0, 0.2, 5.0),
    made_up(1, 0.2, 9.0, "unfinished"),
    made_up(2, 0.2, None, "waiting"),
]


def test_mean_and_spread_over_the_finished_seeds_by_hand():
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, sample variance 14 / 2 = 7."""
    rows = results.summary(RESULTS)
    three, one = rows["ppo.kl = 0.1"]["ppo/gold"], rows["ppo.kl = 0.2"]["ppo/gold"]
    assert (three.n, three.mean, three.low, three.high) == (3, 3.0, 1.0, 6.0)
    assert three.std == pytest.approx(7**0.5) and three.std == statistics.stdev([1, 2, 6])
    assert str(three) == "3 ± 2.65"
    assert (one.n, one.mean, str(one)) == (1, 5.0, "5")  # one seed has no spread; the unfinished one does not count
    assert rows["ppo.kl = 0.1"]["ppo/kl"].mean == 6.0


def test_tables_and_page(tmp_path):
    page = results.write_sweep(tmp_path, RESULTS).read_text()
    assert "<td>ppo.kl = 0.1</td>" in page and "3 ± 2.65" in page and "4 of 6 runs finished" in page
    assert page.count("<svg ") == 1 and "ppo/kl" not in page  # the telling metric alone
    assert "http" not in page.replace("http://www.w3.org", "")
    with (tmp_path / "sweep_groups.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [(row["ppo.kl"], row["metric"], row["n"], row["mean"]) for row in rows[:2]] == [
        ("0.1", "ppo/gold", "3", "3.0"),
        ("0.1", "ppo/kl", "3", "6.0"),
    ]
    assert "ppo/kl" in results.write_sweep(tmp_path, RESULTS, ["ppo/kl"]).read_text()
    with pytest.raises(ConfigError, match="--metrics=bogus: no run has it; known: ppo/gold, ppo/kl"):
        results.write_sweep(tmp_path, RESULTS, ["bogus"])
    for none in ([], [made_up(0, 0.1, None, "waiting")]):
        assert "0 of" in results.write_sweep(tmp_path, none).read_text()


def test_one_number_is_an_axis_and_anything_else_a_list():
    assert results.points(RESULTS, "ppo/gold") == (
        {"ppo.kl = 0.1": [1.0, 2.0, 6.0], "ppo.kl = 0.2": [5.0]},
        [0.1, 0.2],
    )
    named = [results.Result(x, {"loss": x}, {}, "done", {"m": 1.0}) for x in "ab"]
    assert results.points(named, "m") == ({"loss = a": [1.0], "loss = b": [1.0]}, None)
    base = [results.Result("base", {}, {}, "done", {"m": 1.0}), *RESULTS]
    assert results.points(base, "ppo/gold")[1] is None


def test_groups_that_differ_at_their_end_are_told_apart_in_a_figure():
    """An option a line; of `sft.init_from = a/long/…/model` the last 29 characters of 30."""
    names = [f"sft.init_from = {'long/' * 9}model, kl = 0.{i}" for i in range(2)]
    svg = figures.spread({name: [1.0, 2.0] for name in names})
    label = "…" + ("long/" * 9 + "model")[-29:]
    assert svg.count(f">{label}<") == 2 and svg.count(">kl = 0.0<") == svg.count(">kl = 0.1<") == 1


def test_a_recipes_results_are_those_of_its_stages(finished):
    result = results.read_result(finished.parent, finished.name, {}, {})
    done = json.loads((finished / "06_evaluate" / "done.json").read_text())["metrics"]
    assert result.status == "done" and result.group == results.BASE
    assert result.metrics["evaluate/gold_win_rate"] == done["evaluate/gold_win_rate"]
    assert "ppo/loss" in result.metrics and result.telling[0] == "evaluate/gold_win_rate"
    assert results.read_result(finished.parent, "nothing", {}, {}).status == "waiting"

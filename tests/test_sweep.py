"""Sweeps: what a file's sweep(add) expands to, how runs are run and stopped, and what is collected
of them.
"""

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

from launch.shell import slug
from rlhfjax import commands, precision, trackers
from rlhfjax import main as command_line
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError, Preempted
from rlhfjax.report import figures
from rlhfjax.report import sweep as results
from rlhfjax.sweep import chain, command, grid, pool, product, queued, seeds, zipped
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
    file.write_text(
        FILE.format(data=data, body="".join(f"    {line}\n" for line in lines))
    )
    return str(file)


def test_combinators_by_hand():
    a, b = grid("a", 1, 2), grid("b", "x", "y")
    assert product(a, b) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert product() == [{}]
    assert zipped(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert chain(a, b) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]
    assert seeds(2) == [{"arg.seed": 0}, {"arg.seed": 1}]
    assert seeds(2, "seed", first=100) == [{"seed": 100}, {"seed": 101}]
    assert product(zipped(a, b), seeds(2, "seed"))[1] == {"a": 1, "b": "x", "seed": 1}
    with pytest.raises(ConfigError, match="lengths 2, 3"):
        zipped(a, seeds(3))
    with pytest.raises(ConfigError, match="'a' is set by two"):
        product(a, b, a)


def test_a_runs_name_says_its_overrides_and_fits_a_path():
    assert (
        name_of({"ppo.kl.coefficient": 0.05, "arg.seed": 1})
        == "ppo.kl.coefficient=0.05,seed=1"
    )
    assert (
        name_of({"a": True, "b": (1, 2)})
        == f"a=true,b=-1,-2--{_hash('a=true,b=(1, 2)')}"
    )
    assert name_of({}) == "base"
    slashes, dots = name_of({"init_from": "runs/a"}), name_of({"init_from": "runs-a"})
    assert "/" not in slashes and slashes != dots
    long = [name_of({"x": "y" * 500 + end}) for end in "ab"]
    assert long[0] != long[1] and all(len(name) < 150 for name in long)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def test_a_command_leads_to_the_config_that_was_checked(tmp_path, monkeypatch):
    """What `rlhfjax COMMAND` makes of each run's words is the config in `Run.config`, value for
    value.
    """
    from rlhfjax import recipe

    seen = []
    monkeypatch.setattr(
        recipe,
        "run",
        lambda config, workdir, cache: seen.append((to_dict(config), workdir)),
    )
    monkeypatch.setattr(commands, "report", lambda fv: None)
    file = tmp_path / "swept.py"
    file.write_text(
        "from rlhfjax.sweep import *\n"
        f"exec(open({str(ROOT / 'experiments/quickstart/recipe.py')!r}).read().partition('def "
        "sweep')[0])\n"
        "def sweep(add):\n"
        "    for one in product(grid('ppo.kl.coefficient', 1, 1e-05), grid('sft.log.tensorboard', "
        "False),\n"
        "                       grid('reward.init_from', 'elsewhere'), grid('ppo.steps', 7), "
        "seeds(2)): add(one)\n"
    )
    runs = expand(f"{file}:size=smoke", tmp_path, {"pretrain.model.n_kv_heads": 1})
    assert len(runs) == 4 and len({run.name for run in runs}) == 4
    for run in runs:
        command_line.main(["rlhfjax", *run.command])
        assert seen.pop() == (run.config, run.workdir)
    assert (
        runs[0].config["ppo"]["kl"]["coefficient"] == 1.0
        and runs[2].config["ppo"]["kl"]["coefficient"] == 1e-5
    )
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
    (run.workdir / "done.json").write_text('{"metrics": {}}')
    assert expand(file, tmp_path / "sweep")[0].finished
    Path(file).write_text(Path(file).read_text().replace("vocab=270", "vocab=280"))
    with pytest.raises(
        ConfigError,
        match=r"seed=1 was started with another config \(vocab_size: 270 -> 280\)",
    ):
        expand(file, tmp_path / "sweep")


def test_a_sweep_resumes_runs_whose_dtype_was_chosen(tmp_path, monkeypatch):
    """config.json has the dtype that "auto" stood for; the file has "auto"."""
    monkeypatch.setattr(precision, "here", lambda: "bfloat16_products")
    file = f"{ROOT}/experiments/quickstart/recipe.py:size=smoke"
    run = expand(file, tmp_path)[0]
    run.workdir.mkdir()
    resolved = precision.resolved(run.config)
    assert resolved != run.config
    (run.workdir / "config.json").write_text(json.dumps(resolved))
    (run.workdir / "metrics.jsonl").write_text("")
    monkeypatch.setattr(precision, "here", lambda: "float32")
    assert expand(file, tmp_path)[0].name == run.name


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{code}"]


def test_at_most_so_many_at_a_time_and_a_failure_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POLL", 0.02)
    mark = f"p = {str(tmp_path)!r} + '/live' + str(os.getpid()); open(p, 'w'); time.sleep(0.2)\n"
    live = f"[x for x in os.listdir({str(tmp_path)!r}) if x.startswith('live')]"
    count = f"print(len({live})); os.remove(p)"
    commands = {
        str(i): python(mark + count + ("; sys.exit(3)" if i == 1 else ""))
        for i in range(5)
    }
    said = []
    codes = pool.run_all(commands, tmp_path, parallel=2, say=said.append)
    assert codes == {"0": 0, "1": 3, "2": 0, "3": 0, "4": 0}
    alive = [int(pool.log_of(tmp_path, name).read_text()) for name in commands]
    assert max(alive) == 2 and len(said) == 5
    assert command.why(codes, tmp_path, ["1"]) == [f"1 (exit code 3: {alive[1]})"]


def test_no_two_running_commands_have_one_slot(tmp_path):
    """Six commands in two slots: each makes a folder of its slot's name, which must not be there,
    and removes it.
    """
    slot = f"{tmp_path}/{{slot}}"
    script = f"mkdir {slot} && sleep 0.05 && rmdir {slot} && echo {{slot}}"
    commands = {f"run{i}": ["sh", "-c", script] for i in range(6)}
    assert set(pool.run_all(commands, tmp_path, 2).values()) == {0}
    used = {pool.log_of(tmp_path, name).read_text().strip() for name in commands}
    assert used == {"0", "1"}


def test_slices_in_turn_keep_their_tpus_and_delete_them_at_the_end(
    tmp_path, monkeypatch, capsys
):
    """Three runs on two TPUs: every run on a kept one, then one `down` for each."""
    stub = [sys.executable, "-c", "import sys; print(*sys.argv[1:])"]
    file = write(tmp_path, "for one in grid('vocab_size', 280, 290, 300): add(one)")
    monkeypatch.setattr(command, "TPU", tuple(stub))
    options = command.Options(
        launcher=(*stub, "run", "--name={name}", "--zone=z", "--spot", "--"),
        slices_in_turn=2,
    )
    command.sweep(file, tmp_path / "kl", {}, options)
    logs = [
        pool.log_of(tmp_path / "kl", f"vocab_size={n}").read_text()
        for n in (280, 290, 300)
    ]
    assert all(" --zone=z --spot --keep -- rlhfjax train " in log for log in logs)
    assert {log.split()[1] for log in logs} == {"--name=kl-0", "--name=kl-1"}
    runs = json.loads((tmp_path / "kl" / trackers.SWEEP).read_text())["runs"]
    assert runs == [f"vocab_size={n}" for n in (280, 290, 300)]
    out = capsys.readouterr().out
    assert (
        all(f"down --name=kl-{slot} --zone=z\n" in out for slot in (0, 1))
        and out.count(" down ") == 2
    )
    with pytest.raises(ConfigError, match="expected --launcher='tpu"):
        command.sweep(file, tmp_path / "kl", {}, command.Options(slices_in_turn=2))


def test_a_preempted_run_starts_again(tmp_path):
    once = f"p = {str(tmp_path / 'been')!r}\nif not os.path.exists(p): open(p, 'w'); sys.exit(75)"
    assert pool.run_all({"a": python(once)}, tmp_path, say=lambda _: None) == {"a": 0}


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_lets_runs_save_and_starts_no_more(number, raised, tmp_path):
    saves = (
        f"def save(*_): time.sleep(0.3); open({str(tmp_path)!r} + '/saved', 'a').write('x'); "
        "sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )

    def stop():
        while not all(
            "ready" in log.read_text()
            for log in [pool.log_of(tmp_path, "a"), pool.log_of(tmp_path, "b")]
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    for name in "ab":
        (tmp_path / "logs").mkdir(exist_ok=True)
        pool.log_of(tmp_path, name).touch()
    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(raised):
        pool.run_all(
            dict.fromkeys("abc", python(saves)),
            tmp_path,
            parallel=2,
            say=lambda _: None,
        )
    thread.join()
    assert (tmp_path / "saved").read_text() == "xx"
    assert not pool.log_of(tmp_path, "c").exists()
    assert signal.getsignal(number) is before


def test_a_second_sweep_waits_for_the_processes_of_a_killed_one(tmp_path):
    """The lock is held by the runs themselves.

    A sweep that was killed outright leaves nobody's run to be doubled.
    """
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
    """Real processes: two settings, one of which cannot work.

    Then the same again, which runs that one only.
    """
    sweeps = "product(grid('vocab_size', 300), seeds(1)), grid('vocab_size', 9999)"
    lines = f"for one in chain({sweeps}): add(one)"
    file = write(tmp_path, lines, data=conversations)
    workdir = tmp_path / "sweep"
    args = [
        "rlhfjax",
        "sweep",
        f"--config={file}",
        f"--workdir={workdir}",
        "--parallel=2",
    ]
    command_line.main([*args, "--dry_run"])
    out = capsys.readouterr().out.splitlines()
    assert (
        len(out) == 3
        and all(" -m rlhfjax train --config=" in line for line in out[:2])
        and out[2] == "# 2 runs, 0 of them finished"
        and not workdir.exists()
    )
    with pytest.raises(SystemExit) as caught:
        command_line.main(args)
    err = capsys.readouterr().err
    assert caught.value.code == 1 and err.startswith(
        "rlhfjax: 1 of 2 runs failed: vocab_size=9999 (exit code 2: rlhfjax:"
    )
    assert err.count("\n") == 1
    with (workdir / "sweep.csv").open() as f:
        rows = {row["run"]: row for row in csv.DictReader(f)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "vocab_size=300,seed=0": "done",
        "vocab_size=9999": "unfinished",
    }
    assert float(rows["vocab_size=300,seed=0"]["vocab_size"]) == 300
    before = (workdir / "vocab_size=300,seed=0" / "done.json").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        command_line.main(
            [*args, "--launcher=false"]
        )  # which fails at once, whatever it is to run
    out = capsys.readouterr().out
    assert (
        "2 runs, 1 of them finished" in out
        and "vocab_size=9999: failed with exit code 1" in out
    )
    assert (
        workdir / "vocab_size=300,seed=0" / "done.json"
    ).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("local", f"{sys.executable} -m"),
        (
            "slurm --gpus_per_node=8",
            f"{sys.executable} -m launch.slurm submit --wait --name={{}} --gpus_per_node=8 --",
        ),
        (
            "tpu --zone=z --",
            f"{sys.executable} -m launch.tpu run --name={{}} --zone=z --",
        ),
        (
            "gke --name=x-{name}",
            f"{sys.executable} -m launch.gke submit --name={{}} --name=x-{{}} --",
        ),
        (
            "ssh --hosts='a b'",
            f"{sys.executable} -m launch.ssh run --name={{}} '--hosts=a b' --",
        ),
        ("env A=1 {name}", "env A=1 {}"),
    ],
)
def test_a_launcher_takes_the_runs_command_after_its_own(
    launcher, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    file = write(tmp_path, "add({'vocab_size': 280})")
    args = [
        "rlhfjax",
        "sweep",
        f"--config={file}",
        f"--workdir={tmp_path}",
        "--dry_run",
    ]
    command_line.main([*args, f"--launcher={launcher}", "--cache="])
    line, _ = capsys.readouterr().out.splitlines()
    assert line == (
        words.replace("{}", "vocab_size=280")
        + f" rlhfjax train --config={file} --workdir={tmp_path}/vocab_size=280 "
        "--config.vocab_size=280"
    )


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        (
            "slrum --nodes=2",
            "expected local, tpu, gke, slurm, ssh, or a command that is installed",
        ),
        ("", "expected local, tpu, gke, slurm, ssh, or a command that is installed"),
        ("env 'a", "no closing quotation"),
        (
            "tpu --zone=z",
            "launch/tpu.py is not in this folder; run this in the repository's folder",
        ),
    ],
)
def test_a_launcher_that_is_none_is_one_line(
    launcher, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, "add({'vocab_size': 280})")
    with pytest.raises(SystemExit) as caught:
        command_line.main(
            [
                "rlhfjax",
                "sweep",
                f"--config={file}",
                "--workdir=a",
                f"--launcher={launcher}",
                "--dry_run",
            ]
        )
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and said in err


KUBECTL = """#!/bin/sh
# Jobs are files of $STANDIN/jobs that hold their state; the first three looks at them fail.
echo "$*" >> $STANDIN/calls
while [ "${1#--}" != "$1" ]; do shift; done
case "$1 $2" in
  apply*)
    cat > $STANDIN/manifest
    name=$(sed -n 's/^    "name": "\\(.*\\)",*$/\\1/p' $STANDIN/manifest | head -1)
    if grep -q vocab_size=290 $STANDIN/manifest; then end=Failed; else end=Completed; fi
    echo $end > $STANDIN/jobs/$name ;;
  'get deployment') echo jobset:v0.8.0 ;;
  'get jobset')
    case "$*" in
      *json)
        [ $(grep -c 'output=json$' $STANDIN/calls) -le 3 ] &&
          { echo 'Unable to connect' >&2; exit 1; }
        shift 2
        printf '{"kind": "List", "items": ['
        comma=
        for name in "$@"; do
          case $name in --*) continue ;; esac
          state=$(cat $STANDIN/jobs/$name)
          printf '%s{"metadata": {"name": "%s"}, ' "$comma" $name
          printf '"spec": {}, "status": {"terminalState": "%s"}}' $state
          comma=,
        done
        echo ']}' ;;
      *) [ -e $STANDIN/jobs/$3 ] || { echo NotFound >&2; exit 1; }; cat $STANDIN/jobs/$3 ;;
    esac ;;
esac
"""


def test_gke_orders_a_sweep_and_no_process_waits_for_a_run(
    tmp_path, monkeypatch, capsys
):
    """All runs are submitted, then one call asks for all states.

    A cluster that does not answer is asked again.
    """
    (tmp_path / "jobs").mkdir()
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setattr(queued, "POLL", 0.01)
    monkeypatch.chdir(ROOT)
    file = write(tmp_path, "for one in grid('vocab_size', 280, 290): add(one)")
    launcher = "gke --context=c --image=i --topology=4x4 --queue=tpu --poll=0 --nocheck"
    args = [
        "rlhfjax",
        "sweep",
        f"--config={file}",
        f"--workdir={tmp_path / 'sweep'}",
        f"--launcher={launcher}",
    ]
    with pytest.raises(SystemExit) as caught:
        command_line.main(args)
    out, err = capsys.readouterr()
    assert (
        caught.value.code == 1
        and "1 of 2 runs failed: vocab_size=290 (exit code 1" in err
    )
    assert "2 of 2 runs are submitted" in out and "vocab_size=280: Completed" in out
    assert "does not answer; asking again" in out
    looks = [
        line
        for line in (tmp_path / "calls").read_text().splitlines()
        if line.endswith("--output=json")
    ]
    jobs = " ".join(slug(f"vocab_size={n}") for n in (280, 290))
    assert (
        looks[-1] == f"--context=c get jobset {jobs} --ignore-not-found --output=json"
    )


def test_every_launcher_of_the_folder_is_known():
    """launch/ takes the words, and asks for what is missing.

    A folder's file that is no launcher has no `act`.
    """
    for name, words in command.WORDS.items():
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{name}", *words, "--", "true"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stderr == "launch: --name is required\n"
    files = {
        file.stem
        for file in (ROOT / "launch").glob("*.py")
        if "def act(" in file.read_text()
    }
    assert files == set(command.WORDS)


def made_up(
    seed: int, kl: float, value: float | None, status: str = "done"
) -> results.Result:
    metrics = {} if value is None else {"ppo/gold": value, "ppo/kl": 2 * value}
    return results.Result(
        f"kl={kl},seed={seed}",
        {"ppo.kl": kl},
        {"arg.seed": seed},
        status,
        metrics,
        ("ppo/gold",) if metrics else (),
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
    assert three.std == pytest.approx(7**0.5) and three.std == statistics.stdev(
        [1, 2, 6]
    )
    assert str(three) == "3 ± 2.65"
    assert (one.n, one.mean, str(one)) == (
        1,
        5.0,
        "5",
    )  # one seed has no spread; the unfinished one does not count
    assert rows["ppo.kl = 0.1"]["ppo/kl"].mean == 6.0


def test_tables_and_page(tmp_path):
    page = results.write_sweep(tmp_path, RESULTS).read_text()
    assert (
        "<td>ppo.kl = 0.1</td>" in page
        and "3 ± 2.65" in page
        and "4 of 6 runs finished" in page
    )
    assert page.count("<svg ") == 1 and "ppo/kl" not in page  # the telling metric alone
    assert "http" not in page.replace("http://www.w3.org", "")
    with (tmp_path / "sweep_groups.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [
        (row["ppo.kl"], row["metric"], row["n"], row["mean"]) for row in rows[:2]
    ] == [
        ("0.1", "ppo/gold", "3", "3.0"),
        ("0.1", "ppo/kl", "3", "6.0"),
    ]
    assert "ppo/kl" in results.write_sweep(tmp_path, RESULTS, ["ppo/kl"]).read_text()
    with pytest.raises(
        ConfigError, match="--metrics=bogus: no run has it; known: ppo/gold, ppo/kl"
    ):
        results.write_sweep(tmp_path, RESULTS, ["bogus"])
    for none in ([], [made_up(0, 0.1, None, "waiting")]):
        assert "0 of" in results.write_sweep(tmp_path, none).read_text()


def test_pitfall_35_a_cell_of_what_is_not_finite_is_empty(tmp_path):
    results.write_sweep(tmp_path, [made_up(0, 0.1, float("nan")), made_up(0, 0.2, 5.0)])
    with (
        (tmp_path / "sweep.csv").open() as runs,
        (tmp_path / "sweep_groups.csv").open() as rows,
    ):
        assert [row["ppo/gold"] for row in csv.DictReader(runs)] == ["", "5.0"]
        gold = [row for row in csv.DictReader(rows) if row["metric"] == "ppo/gold"]
    found = [(row["mean"], row["std"]) for row in gold]
    assert found == [("", ""), ("5.0", "")]


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
    assert (
        svg.count(f">{label}<") == 2
        and svg.count(">kl = 0.0<") == svg.count(">kl = 0.1<") == 1
    )


def test_a_recipes_results_are_those_of_its_stages(finished):
    result = results.read_result(finished.parent, finished.name, {}, {})
    done = json.loads((finished / "06_evaluate" / "done.json").read_text())["metrics"]
    assert result.status == "done" and result.group == results.BASE
    assert result.metrics["evaluate/gold_win_rate"] == done["evaluate/gold_win_rate"]
    assert (
        "ppo/loss" in result.metrics and result.telling[0] == "evaluate/gold_win_rate"
    )
    assert results.read_result(finished.parent, "nothing", {}, {}).status == "waiting"

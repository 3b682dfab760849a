"""The config: every flag reaches the model, and what cannot be fails before any work with a cure, not a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import xattn
from xattn.experiments import compare, compose, configfile, evaluate, train
from xattn.experiments.schema import EvalConfig, RunConfig

FAST = ["+debug=fast"]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(main, *argv: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> str:
    """What the command says when it refuses; it must fail, show no traceback and leave nothing behind."""
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = "".join(capfd.readouterr())
    assert exit_.value.code not in (0, None), said
    assert "Traceback" not in said
    assert list(Path().iterdir()) == [], "work was done before the config was refused"
    return said


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    return lambda main, *argv: refused(main, *argv, monkeypatch=monkeypatch, capfd=capfd)


@pytest.mark.parametrize("main", [train.main, compare.main])
@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("model.slidng_window=64", "did you mean model.sliding_window"),
        ("+model.slidng_window=64", "did you mean model.sliding_window"),
        ("++model.slidng_window=64", "did you mean model.sliding_window"),
        ("trainer.stpes=1", "did you mean trainer.steps"),
        ("+trainer.stpes=1", "did you mean trainer.steps"),
        ("trakcing.mode=disabled", "did you mean tracking"),
        ("+eval.flags.self_extend_grop=8", "did you mean eval.flags.self_extend_group"),
        ("model.attn_sliding_window=64", "model.sliding_window"),
        ("sliding_window=64", "did you mean model.sliding_window"),
        ("lr=1e-3", "did you mean optim.lr"),
        ("model=smal", "did you mean model=small"),
        ("+experiment=selectiv", "did you mean experiment=selective"),
        ("+sweep=attention_variant", "did you mean sweep=attention_variants"),
    ],
)
def test_a_typo_gets_a_suggestion_and_no_work_is_done(refuses, main, override: str, cure: str) -> None:
    assert cure in refuses(main, override)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.sim_head=1"], "attn_selective"),
        (["model.attn_selective=true", "model.sim_head=9"], "sim_head=9"),
        (["model.sliding_window=0"], "sliding_window=0"),
        (["model.self_extend_group=4", "model.rotary_pos_emb=null"], "rotary_pos_emb"),
        (["model.kv_heads=3"], "kv_heads=3"),
        (["model.dim=wide"], "dim='wide'"),
        (["trainer.steps=0"], "trainer.steps=0"),
        (["trainer.steps=many"], "error: trainer.steps=many: Value 'many' of type 'str'"),
        (["seed=0,1"], "seed=0,1 gives several values; for a run of each add -m, for a list write seed=[0,1]"),
        (["seed=[0,1"], "error: seed=[0,1 cannot be read"),
        (["--seed", "1"], "--seed is no option; fields stand without dashes: use seed=VALUE"),
        (["--trainer.steps=3"], "use trainer.steps=3"),
        (["--resume", "runs/x"], "use resume=VALUE"),
        (["resume="], "use resume=DIR"),
        (["model.attn_selective=true", "model.attn_backend=sdpa"], "'sdpa' does not implement attn_selective"),
        (["model.attn_backend=spda"], "did you mean sdpa"),
        (["model.attn_backend=sdpa", *(f"eval.flags.self_extend_{x}=4" for x in ("group", "window"))], "self_extend_group"),
        (["data=text", "data.path=gone.txt"], "data.path=gone.txt cannot be read: No such file"),
        (["data=text", f"data.path={__file__}", "data.val_path=*.gone"], "data.val_path=*.gone matches no file"),
        (["data=bin", "data.path=gone"], "data.path=gone has no tokens in train.bin"),
        (["trainer.batch_size=4", "trainer.micro_batch=3"], "(1, 2, 4)"),
        (["model.num_tokens=100"], "256 ids"),
        (["model.max_seq_len=8"], "trainer.seq_len=32"),
        (["optim.name=sgd"], "adamw"),
        (["eval.length_factors=[2]"], "must hold 1"),
        (["data.source=text"], "data.path"),
        (["data.path=x.txt"], "data.source=text"),
        (["seed=-1"], "seed=-1"),
        (["+eval.extensions.typo.slf_extend_group=2"], "self_extend_group"),
        (["model=gigantic"], "small"),
        (["+experiment=nothing"], "selective"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_any_work(refuses, overrides: list[str], named: str) -> None:
    # +debug=fast goes first: a group added later would override these again
    assert named in refuses(train.main, *FAST, *overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["+sweep=quick", "+variants.bad.sim_head=2"], "variant bad"),
        (["+sweep=quick", "+variants.bad=3"], "mapping of flags"),
        (["+sweep=quick", "+variants.bad.slding_window=3"], "did you mean sliding_window"),
        (["+sweep=quick", "baseline=dnese"], "dense"),
        (["+sweep=quick", "seed=0,0"], "seeds=[0, 0]"),
        (["+sweep=quick", "extended=[other]"], "other"),
        (["+sweep=nothing"], "quick"),
        (["+sweep="], "sweep=: there is no such file"),
        (["seed=a"], "error: seeds=[a]: Value 'a'"),
        (["--seeds=0"], "use seeds=0"),
        (["+sweep=quick", "model.attn_backend=sdpa"], "variant selective: attn_backend='sdpa' does not implement"),
        (["variants={}"], "no variants"),
        (["runs=nowhere"], "nowhere"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_any_run(refuses, overrides: list[str], named: str) -> None:
    assert named in refuses(compare.main, *overrides)


@pytest.mark.parametrize(
    ("override", "package"),
    [
        ("tracking.tensorboard=true", "tensorboard"),
        ("data.tokenizer=bpe", "tokenizers"),
        ("data.tokenizer=gpt2", "tiktoken"),
        ("data=hf", "datasets"),
    ],
)
def test_a_missing_package_is_named_before_any_work(refuses, monkeypatch, override: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refuses(train.main, *FAST, override, *(["data.path=x", "data.max_train_tokens=9"] if override == "data=hf" else []))
    assert f"needs the package {package}; pip install" in said


def test_a_device_that_is_not_there_is_named_before_any_work(refuses, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no CUDA device" in refuses(train.main, *FAST, "trainer.device=cuda")


def test_hydra_prints_as_before_after_a_command(refuses, monkeypatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    refuses(train.main, "trainer.steps=many")
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_ones_own_groups_are_known(tmp_path: Path) -> None:
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "windows.yaml").touch()
    schema = compose.schemas()["compare"]
    for spelled in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        compose.check_overrides([*spelled, "+sweep=windows"], schema)
    with pytest.raises(xattn.ConfigError, match="no such file in the group sweep"):
        compose.check_overrides(["+sweep=windows"], schema)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: mine", "begin the file with the line # @package _global_"),
        ("# @package _global_\nmodel: [1", "while parsing a flow sequence"),
        ("# @package _global_\nmodel: [1]", "Cannot merge"),
        ("# @package _global_\nname: ${nowhere}", "key 'nowhere' not found"),
    ],
)
def test_a_file_of_ones_own_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch, capfd, text: str, says: str) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text(text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    argv = ["--config-dir", str(tmp_path / "mine"), "+experiment=short"]
    said = refused(train.main, *argv, monkeypatch=monkeypatch, capfd=capfd)
    assert says in said and len(said.splitlines()) == 1


def test_evaluating_again_takes_the_runs_own_tokens_and_lengths(tmp_path: Path) -> None:
    config = RunConfig(eval=EvalConfig(tokens=512, length_factors=[1, 8]))
    configfile.save_config(config, tmp_path / "config.yaml")
    run, tokens, lengths = f"run={tmp_path}", "eval.tokens=512", "eval.length_factors=[1, 8]"
    assert evaluate.arguments([run]) == [tokens, lengths, run]
    assert evaluate.arguments([run, "eval.tokens=9"]) == [lengths, run, "eval.tokens=9"]
    assert evaluate.arguments([run, "eval.length_factors=[1]"]) == [tokens, run, "eval.length_factors=[1]"]
    assert evaluate.arguments([run, "eval=passkey"]) == [tokens, run, "eval=passkey"], "the group has lengths of its own"
    assert evaluate.arguments(["run=nowhere"]) == ["run=nowhere"]


def test_evaluating_without_a_run_says_what_to_give(refuses) -> None:
    assert "run=DIR" in refuses(evaluate.main)
    assert "no finished run" in refuses(evaluate.main, "run=nowhere")


def test_every_model_flag_can_be_set_without_a_plus() -> None:
    for name in xattn.flag_table():
        compose.check_overrides([f"model.{name}=1"], compose.schemas()["train"])
    assert set(compose.schemas()["train"].model) == set(xattn.flag_table())


def composed(command: str, *overrides: str) -> RunConfig:
    """The checked config that a command line composes to, without running anything."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    for name, node in compose.schemas().items():
        ConfigStore.instance().store(name=f"base_{name}", node=node)
    with initialize_config_dir(config_dir=str(compose.CONFIGS), version_base="1.3"):
        return compose.resolve(hydra_compose(command, overrides=list(overrides)))


def shipped(group: str) -> list[str]:
    return sorted(f"{group}={path.stem}" for path in (compose.CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        *(o for g in ("model", "optim", "schedule", "trainer", "tracking", "eval") for o in shipped(g)),
        *("+" + o for g in ("experiment", "debug") for o in shipped(g)),
    ],
)
def test_every_shipped_training_config_is_valid(override: str) -> None:
    assert composed("train", "run_dir=x", override).model["num_tokens"] == 256


@pytest.mark.parametrize("override", shipped("sweep"))
def test_every_shipped_study_is_valid(override: str) -> None:
    config = composed("compare", "+" + override)
    jobs = compare.plan(config, Path("study"))
    assert len(jobs) == len(config.variants) * len(config.seeds)
    assert len({job.run_dir for job in jobs}) == len(jobs)


def test_flags_reach_the_model_exactly_as_given() -> None:
    config = composed("train", "run_dir=x", "model.sliding_window=48", "model.window_pattern=LLLG", "model.heads=8")
    spec = xattn.to_flags(xattn.parse(config.model))
    assert (config.model["sliding_window"], config.model["window_pattern"], spec["heads"]) == (48, "LLLG", 8)
    assert None not in config.model.values()


def test_an_experiment_overrides_what_the_groups_say() -> None:
    assert composed("train", "run_dir=x", "+experiment=selective").model["attn_selective"] is True


def test_seeds_and_sweeps_are_spelled_as_users_type_them(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compare.arguments(["seed=0,1,2"]) == ["seeds=[0,1,2]", "+sweep=quick"]
    assert compare.arguments(["sweep=x", "model.dim=64"]) == ["+sweep=x", "model.dim=64"]
    assert compare.arguments(["runs=old"]) == ["runs=old"]


def test_a_gpu_gets_the_larger_quick_study_unless_the_cpu_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert compare.arguments([]) == ["+sweep=quick_gpu"]
    assert compare.arguments(["trainer.device=cpu"]) == ["trainer.device=cpu", "+sweep=quick"]
    assert compare.arguments(["+sweep=passkey"]) == ["+sweep=passkey"]


@pytest.mark.parametrize("override", shipped("sweep"))
def test_extensions_of_a_shipped_study_reach_its_longest_length(override: str) -> None:
    """Self-Extend's farthest distance must stay within the trained ones, and a stretch must be as long as some length."""
    config = composed("compare", "+" + override)
    length, longest = config.trainer.seq_len, config.trainer.seq_len * max(config.eval.length_factors)
    extended = config.eval.extensions
    # A list has one value a layer, null where the layer's own window is short already.
    given = (extended["self_extend"][f"self_extend_{part}"] for part in ("window", "group"))
    window, group = (value[-1] if isinstance(value, list) else value for value in given)
    assert window == length // 4 and window + (longest - window) / group < length
    factors = {flags["rope_scaling_factor"] for flags in extended.values() if "rope_scaling" in flags}
    assert max(factors) == longest / length and factors <= set(config.eval.length_factors)
    first = next(job.config for job in compare.plan(config, Path("study")) if job.config.name == config.extended[0])
    assert first.eval.extensions == extended
    for flags in extended.values():
        assert xattn.parse(first.model | flags) != xattn.parse(first.model)


def test_every_cpu_study_can_be_judged_at_eight_times_its_length() -> None:
    eight = composed("compare", "+sweep=attention_variants", "eval=extensions_8x").eval
    assert eight.length_factors == [1, 2, 4, 8] and "yarn_8x" in eight.extensions and "yarn_2x" not in eight.extensions


def test_a_saved_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    config = composed("compare", "+sweep=quick", "model.sliding_window=48", "optim.grad_clip=null")
    configfile.save_config(config, tmp_path / "config.yaml")
    again = configfile.load_config(tmp_path / "config.yaml")
    assert again == configfile.as_run(config)
    assert configfile.differences(config, again) == {}


def test_a_strangers_config_runs_nothing_and_reads_no_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME_SECRET", "open sesame")
    path = tmp_path / "config.yaml"
    path.write_text("name: ${oc.env:HOME_SECRET}\nmodel: {_target_: os.system}\n")
    config = configfile.load_config(path)
    assert config.name == "${oc.env:HOME_SECRET}"
    with pytest.raises(xattn.ConfigError, match="_target_"):
        xattn.parse(config.model | {"num_tokens": 5, "max_seq_len": 5})
    for text in ("!!python/object/apply:os.system ['true']", "a: b", "[1]", "\x00", "trainer: {speed: 9}"):
        path.write_text(text)
        with pytest.raises(xattn.ConfigError, match="config.yaml"):
            configfile.load_config(path)


def test_secrets_of_the_environment_never_reach_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "tr0ub4dor&3")
    config = composed("train", "run_dir=x", "tracking.notes='key: tr0ub4dor&3'")
    configfile.save_config(config, tmp_path / "config.yaml")
    assert "tr0ub4dor" not in (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["tracking"]["notes"] == "key: <SOME_API_KEY>"


@pytest.mark.parametrize("name", ["train", "compare", "eval"])
def test_help_shows_how_a_command_is_used(name: str, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as exit_:
        {"train": train, "compare": compare, "eval": evaluate}[name].main()
    first, *rest = capfd.readouterr().out.splitlines()
    assert exit_.value.code in (0, None) and first.startswith(f"xattn-{name}: ")
    assert any(line.startswith(f"  xattn-{name} ") for line in rest)


def test_cfg_job_shows_the_config_and_trains_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from xattn.experiments.train import main; main()", "--cfg", "job"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True).stdout
    assert yaml.safe_load(shown)["model"]["sliding_window"] is None
    assert list(tmp_path.iterdir()) == []

"""CALM on a Ray cluster of this machine: a replica that is killed or removed under load, the manifest, Ray Data."""

import http.client
import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from model_copies import ROOT
from server_process import free_port, wait_for

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
ray_app = pytest.importorskip("calm_transformers.serving.ray_app")
pytestmark = pytest.mark.transformers  # run where the extra [clients] is installed

ROWS, CLIENTS = 4, 12
LONG = {"prompt": "Once upon a time", "max_tokens": 800, "temperature": 0.5, "ignore_eos": True}


@pytest.fixture(scope="module")
def deploy(tiny_folder):
    """Deploys the model with a number of replicas; the result is the URL."""

    def deploy(replicas, **more):
        args = {"model": tiny_folder, "model_name": "tiny", "min_replicas": replicas, "max_rows": ROWS, **more}
        serve.run(ray_app.app({**args, "num_cpus": 0.5}))
        return f"http://127.0.0.1:{port}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it leaves a token in the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=4, include_dashboard=False)
        port = free_port()
        serve.start(http_options={"port": port})
        yield deploy
        serve.shutdown()
        ray.shutdown()


def ask(url, seed, **options):
    """Returns the text of a seed, streamed if that is odd, or why there is none: the HTTP status, or "broken"."""
    data = json.dumps({**LONG, "stream": seed % 2 == 1, **options, "seed": seed}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            if seed % 2 == 0:
                return json.load(answer)["choices"][0]["text"]
            *events, last = [line.removeprefix(b"data: ") for line in answer if line != b"\n"]
    except urllib.error.HTTPError as error:
        return error.code
    except (http.client.HTTPException, ConnectionError, ValueError):
        return "broken"
    return "".join(json.loads(e)["choices"][0]["text"] for e in events) if last == b"[DONE]\n" else "broken"


def replicas():
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if name.startswith("SERVE_REPLICA"))


def num_running(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        return next(float(line.split()[1]) for line in answer if line.startswith(b"calm_running "))


def test_a_killed_replica_loses_only_the_requests_that_it_held(deploy):
    url = deploy(2)
    with ThreadPoolExecutor(CLIENTS) as pool:
        expected = list(pool.map(lambda seed: ask(url, seed), range(2 * CLIENTS)))
        assert all(isinstance(text, str) and len(text) > 100 for text in expected) and len(set(expected)) > CLIENTS
        answers = [pool.submit(ask, url, seed) for seed in range(2 * CLIENTS)]
        wait_for("the first of them ends", lambda: any(answer.done() for answer in answers))
        before = replicas()
        ray.kill(ray.get_actor(before[0], namespace="serve"))
        answers = [answer.result() for answer in answers]
    lost = [answer for answer, text in zip(answers, expected, strict=True) if answer != text]
    assert lost and set(lost) <= {500, "broken"} and len(lost) <= ROWS, lost
    wait_for("another replica", lambda: len(replicas()) == 2 and replicas() != before)


def test_a_removed_replica_finishes_its_requests(deploy):
    url = deploy(2)
    with ThreadPoolExecutor(2 * ROWS) as pool:
        expected = list(pool.map(lambda seed: ask(url, seed), range(2 * ROWS - 2)))
        answers = [pool.submit(ask, url, seed) for seed in range(2 * ROWS - 2)]
        wait_for("both are busy", lambda: min(num_running(url) for _ in range(8)) > 1)
        deploy(1)
        assert [answer.result() for answer in answers] == expected
    wait_for("one replica", lambda: len(replicas()) == 1)


def test_the_manifest_deploys_what_ray_serve_and_the_application_accept():
    from ray.serve.schema import ServeDeploySchema

    spec = yaml.safe_load((ROOT / "docs" / "kuberay.yaml").read_text())["spec"]
    (config,) = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
    assert config.import_path == f"{ray_app.__name__}:app"
    deployment = ray_app.app(config.args)._bound_deployment
    fields, (workers,) = deployment._deployment_config, spec["rayClusterConfig"]["workerGroupSpecs"]
    scaling = fields.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (workers["minReplicas"], workers["maxReplicas"]) == (2, 8)
    assert deployment.ray_actor_options["num_gpus"] == 1 and fields.max_ongoing_requests == 32


@pytest.mark.parametrize("args", [{"model": ".", "port": 9000}, {"model": ".", "max_row": 1}, {}])
def test_other_arguments_are_refused(args):
    with pytest.raises(ValueError, match="port|max_row|model"):
        ray_app.app(args)


def test_ray_data_continues_a_file_of_prompts(deploy, tiny_folder, tmp_path):
    """Runs the documented program with the tiny model; each text is what the server gives for its seed."""
    page = (ROOT / "docs/guides/deploy.md").read_text(encoding="utf-8")
    program = next(block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "ray.data" in block)
    prompts = [f"Once upon {i}" for i in range(100)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    for documented, actual in (("prompts.jsonl", tmp_path / "prompts.jsonl"), ("texts", tmp_path / "texts")):
        program = program.replace(f'"{documented}"', f'"{actual}"')
    url = deploy(1)
    exec(program.replace('["."]', f'["{tiny_folder}"]').replace("concurrency=2", "concurrency=1"), {})
    rows = [json.loads(line) for file in (tmp_path / "texts").iterdir() for line in file.read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == sorted(prompts)
    for row in rows[:3]:
        assert row["text"] == ask(url, 0, prompt=row["prompt"], max_tokens=60, ignore_eos=False)


def test_a_full_queue_is_a_429(deploy):
    url = deploy(1, max_waiting=8)
    with ThreadPoolExecutor(40) as pool:
        refused = [answer for answer in pool.map(lambda i: ask(url, 2 * i), range(40)) if answer in (429, 503)]
    assert set(refused) == {429} and len(refused) > 20

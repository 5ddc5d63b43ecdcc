"""The dashboard: its JSON, its stream, its files, and the page itself in a real browser."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import time
from pathlib import Path

import httpx
import pytest
from tinker import types

from lorica.core.errors import FormatError, MissingError
from lorica.server import assets
from tests.server.conftest import InThread, Process, datum, step

CHROMIUM = Path("/usr/bin/chromium")
API = "/api/lorica/v1"
slow = pytest.mark.slow


def get(server, path, key=None, status=200):
    answer = httpx.get(f"{server.url}{path}", headers={"x-api-key": key or server.key})
    assert answer.status_code == status, answer.text
    return answer.json()


@contextlib.contextmanager
def following(server, key=None):
    """The stream's changes, as (kind, data)."""
    with httpx.stream("GET", f"{server.url}{API}/events", headers={"x-api-key": key or server.key}, timeout=30) as got:
        assert got.status_code == 200

        def changes():
            kind = ""
            for line in got.iter_lines():
                if line.startswith("event:"):
                    kind = line[6:].strip()
                elif line.startswith("data:"):
                    yield kind, json.loads(line[5:])

        yield changes()


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../assets.py", "views/../../assets.py", "/etc/passwd", "", "uplot/../LICENSE", "uplot/package.json",
             "views//run.js", "views", "style.css/x", "..\\assets.py", "a\0.js", "x.py"]
)  # fmt: skip
def test_only_the_pages_own_files_are_found(name):
    assert assets.find(name) is None


def test_every_file_that_the_page_names_is_there():
    for path in [*assets.STATIC.rglob("*.html"), *assets.STATIC.rglob("*.js")]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'"(/static/[^"]+|\.{1,2}/[^"]+\.js)"', text):
            if name.startswith("/static/uplot/"):
                assert name.rsplit("/", 1)[1] in assets.FILES.values()
                continue
            target = assets.STATIC / name.removeprefix("/static/") if name.startswith("/") else path.parent / name
            assert target.is_file(), f"{path.name} names {name}"


def test_the_page_names_no_other_host():
    for path in assets.STATIC.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text and "https://" not in text, path


def test_another_tarball_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "homes", lambda: [tmp_path / "home"])
    wrong = tmp_path / "uplot.tgz"
    with tarfile.open(wrong, "w:gz") as archive:
        info = tarfile.TarInfo("package/dist/uPlot.esm.js")
        archive.addfile(info, io.BytesIO())
    with pytest.raises(FormatError, match="digest is not the one"):
        assets.install(wrong)
    assert assets.charts() is None


def test_without_npm_the_sentence_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "homes", lambda: [tmp_path / "home"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="npm is not installed"):
        assets.install()
    assert assets.main([]) == 1
    assert "npm pack uplot@" in capsys.readouterr().err


def test_the_digest_is_of_the_kind_that_npm_writes():
    algorithm, _, digest = assets.INTEGRITY.partition("-")
    assert hashlib.new(algorithm).digest_size * 4 // 3 + 3 >= len(digest.rstrip("="))


@slow
def test_the_page_and_its_files_are_served_with_a_strict_policy(server):
    page = httpx.get(f"{server.url}/")
    assert page.status_code == 200 and "unsafe" not in page.headers["content-security-policy"]
    script = httpx.get(f"{server.url}/static/app.js")
    assert script.status_code == 200 and "javascript" in script.headers["content-type"]
    assert httpx.get(f"{server.url}/static/nothing.js").status_code == 404


# -- JSON -----------------------------------------------------------------------------------------------------------


@slow
def test_a_curve_is_of_one_token_and_grows_with_every_step(server, service):
    run = service.create_lora_training_client("nano", rank=4, user_metadata={"name": "curve"}).result()
    tokens = range(5, 21)
    weights = [0.0] * 8 + [1.0] * 8
    with following(server) as changes:
        assert next(changes)[0] == "reload"
        losses = [step(run, [datum(tokens, weights)], lr=1e-2) for _ in range(3)]
        points = []
        for kind, data in changes:
            if kind == "point" and data["run"] == run.model_id:
                points.append(data)
            if len(points) == 3:
                break
    told = get(server, f"{API}/runs/{run.model_id}")
    assert told["curve"]["loss"] == pytest.approx([loss / 8 for loss in losses])
    assert told["curve"]["step"] == [1, 2, 3] and told["curve"]["tokens"] == [16, 32, 48]
    assert [point["loss"] for point in points] == told["curve"]["loss"]
    assert all(norm > 0 for norm in told["curve"]["grad_norm"]) and told["curve"]["lr"] == [1e-2] * 3
    assert (told["method"], told["rank"], told["state"], told["stride"]) == ("lora", 4, "idle", 1)
    listed = next(one for one in get(server, f"{API}/runs")["runs"] if one["id"] == run.model_id)
    assert listed["last"]["step"] == 3 and listed["last"]["loss"] == told["curve"]["loss"][-1]


@slow
def test_passes_that_are_accumulated_are_one_step(server, service):
    run = service.create_lora_training_client("nano", rank=4).result()
    first = run.forward_backward([datum(range(5, 9))], "cross_entropy").result().metrics["loss:sum"]
    second = run.forward_backward([datum(range(9, 21))], "cross_entropy").result().metrics["loss:sum"]
    run.forward([datum(range(5, 9))], "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    curve = get(server, f"{API}/runs/{run.model_id}")["curve"]
    assert curve["loss"] == pytest.approx([(first + second) / 16]) and curve["tokens"] == [16]


@slow
def test_a_tenant_sees_its_own_and_an_operator_all(server):
    key = server.new_key("anna")
    client = server.client(key)
    run = client.create_lora_training_client("nano", rank=4).result()
    run.save_weights_for_sampler("mine").result()
    step(run, [datum(range(5, 9))])
    mine = get(server, f"{API}/overview", key)
    assert (mine["tenant"], mine["operator"]) == ("anna", False)
    assert {one["tenant"] for one in get(server, f"{API}/runs", key)["runs"]} == {"anna"}
    assert [one["name"] for one in get(server, f"{API}/checkpoints", key)["checkpoints"]] == ["mine"]
    assert [one["name"] for one in get(server, f"{API}/tenants", key)["tenants"]] == ["anna"]
    other = server.new_key("bert")
    for path in (f"{API}/runs/{run.model_id}", f"{API}/runs/nothing"):
        assert get(server, path, other, 404)["code"] == "missing"
    assert get(server, f"{API}/overview")["operator"] is True
    assert "anna" in {one["name"] for one in get(server, f"{API}/tenants")["tenants"]}
    assert get(server, f"{API}/runs/{run.model_id}")["tenant"] == "anna"
    client.close("success").result(30)


@slow
@pytest.mark.parametrize("path", ["overview", "runs", "runs/x", "checkpoints", "tenants", "events"])
def test_nothing_is_told_without_a_key(server, path):
    assert httpx.get(f"{server.url}{API}/{path}").status_code == 401


@slow
def test_a_tenants_stream_tells_nothing_of_others(server, service):
    with following(server, server.new_key("carl")) as changes:
        assert next(changes)[0] == "reload"
        run = service.create_lora_training_client("nano", rank=4).result()
        step(run, [datum(range(5, 9))])
        run.save_weights_for_sampler("x").result()
        server.loop.call_soon_threadsafe(server.server.observer.changes.publish, "end", {}, "carl")
        kinds = set()
        for kind, _ in changes:
            kinds.add(kind)
            if kind == "end":
                break
    assert kinds <= {"stats", "engine", "end"}


@slow
def test_a_curve_survives_a_kill_of_both_processes(tmp_path):
    server = Process(tmp_path, "--deterministic")
    server.start()
    from tinker import ServiceClient

    client = ServiceClient(base_url=server.url, api_key=server.key)
    run = client.create_lora_training_client("nano", rank=4).result()
    losses = [step(run, [datum(range(5, 21))], lr=1e-2) for _ in range(3)]
    server.kill("both")
    losses += [step(run, [datum(range(5, 21))], lr=1e-2) for _ in range(2)]
    curve = get(server, f"{API}/runs/{run.model_id}")["curve"]
    assert curve["step"] == [1, 2, 3, 4, 5]
    assert curve["loss"] == pytest.approx([loss / 16 for loss in losses], rel=1e-6)
    client.close("success").result(30)
    assert server.terminate() == 0


@slow
def test_a_server_that_stops_ends_its_streams_at_once(tmp_path):
    server = InThread(tmp_path)
    with following(server) as changes:
        assert next(changes)[0] == "reload"
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 8
        assert {kind for kind, _ in changes} <= {"stats", "engine"}


# -- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip("there is no /usr/bin/chromium: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=quiet)
        yield running
        running.close()


@pytest.fixture
def page(browser, server):
    """A page of the server, signed in; whatever it complains of is a failure."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    said = []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(f"{server.url}/")
    opened.fill("#key", server.key)
    opened.click("button.primary")
    opened.wait_for_selector("nav a")
    yield opened
    context.close()
    assert said == []


def charts_or_skip():
    if assets.charts() is None:
        pytest.skip("uPlot is not installed: python -m lorica.server.assets")


@slow
def test_a_curve_grows_before_ones_eyes(page, server, service):
    charts_or_skip()
    run = service.create_lora_training_client("nano", rank=8, user_metadata={"name": "watched"}).result()
    row = page.locator(f'tr[data-run="{run.model_id}"]')
    row.wait_for()
    page.evaluate("window.untouched = true")
    step(run, [datum(range(5, 21))], lr=1e-2)
    row.locator("td", has_text=re.compile(r"^1$")).wait_for()
    page.goto(f"{server.url}/#/runs/{run.model_id}")
    page.wait_for_selector(".chart canvas")
    for _ in range(4):
        step(run, [datum(range(5, 21))], lr=1e-2)
    page.locator("dt:text-is('steps') + dd", has_text="5").wait_for()
    assert page.evaluate("window.untouched")
    before = page.locator("dt:text-is('last loss') + dd").inner_text()
    page.reload()
    page.locator("dt:text-is('steps') + dd", has_text="5").wait_for()
    assert page.locator("dt:text-is('last loss') + dd").inner_text() == before


def drawn(page):
    """Wait until both columns say how long they took."""
    for number in range(2):
        page.locator(".column .note", has_text="characters in").nth(number).wait_for()


@slow
def test_base_and_adapter_are_sampled_side_by_side(page, server, service):
    run = service.create_lora_training_client("nano", rank=4).result()
    path = run.save_weights_for_sampler("beside").result().path
    page.goto(f"{server.url}/#/sample")
    page.fill("#field-prompt", "What is the capital of France?")
    page.select_option("#field-a", path)
    page.fill("#field-tokens", "12")
    page.click("form button.primary")
    drawn(page)
    texts = page.locator(".column .text").all_inner_texts()
    assert texts[0] and texts[0] == texts[1]  # a fresh adapter changes nothing
    page.reload()
    drawn(page)
    assert page.locator(".column .text").all_inner_texts() == texts


@slow
@pytest.mark.parametrize("view", ["engine", "checkpoints", "tenants"])
def test_every_view_shows_something(page, server, view):
    page.goto(f"{server.url}/#/{view}")
    page.wait_for_selector("main .card")
    assert page.locator("nav a[aria-current]").count() == 1
    assert page.locator(".bad").count() == 0


@slow
def test_a_wrong_key_is_told_so(browser, server):
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    opened.goto(f"{server.url}/")
    opened.fill("#key", "tml-wrong")
    opened.click("button.primary")
    opened.locator(".bad", has_text="This API key is not valid here.").wait_for()
    context.close()


@slow
def test_names_that_hold_markup_are_text(page, server, service):
    service.create_lora_training_client("nano", rank=4, user_metadata={"name": "<img src=x onerror=alert(1)>"}).result()
    page.locator("td a", has_text="<img src=x").wait_for()
    assert page.locator("td img").count() == 0


@slow
def test_without_uplot_a_sentence_stands_for_the_charts(browser, server, monkeypatch):
    monkeypatch.setattr(assets, "homes", list)
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    opened.goto(f"{server.url}/")
    opened.fill("#key", server.key)
    opened.click("button.primary")
    opened.locator(".chart .sentence", has_text="Charts need uPlot").first.wait_for()
    opened.wait_for_selector("tbody tr, .sentence")
    context.close()

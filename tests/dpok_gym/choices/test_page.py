"""The page without a browser: forms, cookies, what is refused, and what is escaped."""

import re
from html import unescape

import pytest
from starlette.testclient import TestClient

from dpok_gym.choices import page
from dpok_gym.choices.page import make_app
from dpok_gym.choices.records import read_choices
from tests.dpok_gym.choices.support import make_pairs, make_session

EVIL = '<script>alert("1")</script> & "two" stars'


@pytest.fixture
def session(tmp_path):
    make_pairs(tmp_path, 6, EVIL, (None, "runs/<b>"))
    return make_session(tmp_path)


@pytest.fixture
def client(session):
    return TestClient(make_app(session), base_url="http://127.0.0.1:8100")


def visit(client, name="ada"):
    return client.post("/", data={"name": name})


def form_of(response):
    """Returns the hidden fields of the form of choices."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="(\w*)">', response.text))


def choose(client, verdict="left", **changes):
    return client.post("/choose", data=form_of(client.get("/choose")) | {"verdict": verdict} | changes)


def test_a_round(client, session):
    first = client.get("/")
    assert "There are 6 pairs" in first.text
    shown = visit(client)
    assert (shown.status_code, shown.url.path) == (200, "/choose")
    for verdict in ("left", "right", "tie", "both-bad", "left", "skip", "right"):  # the last one is a repeat
        assert choose(client, verdict).status_code == 200
    done = client.get("/choose").text
    assert "All done. Thank you, ada!" in done
    assert "dpok fit-reward" in done
    reasons = [choice.reason for choice in read_choices(session.store.path)]
    assert reasons == [None, None, "tie", "both-bad", None, "skip", None]
    report = client.get("/report").text
    assert "Choices" in report
    assert "runs/&lt;b&gt;" in report


def test_a_reload_and_a_double_click_answer_once(client, session):
    visit(client)
    form = form_of(client.get("/choose")) | {"verdict": "left"}
    assert form_of(client.get("/choose"))["question"] == form["question"]  # a reload shows the same
    answer = client.post("/choose", data=form, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/choose")
    again = client.post("/choose", data=form)
    assert "answered already" in again.text
    assert len(session.store.choices) == 1


def test_undo(client, session):
    visit(client)
    assert 'id="undo-button" disabled' in client.get("/choose").text
    before = client.get("/choose")
    choose(client, "left")
    after = client.post("/undo")
    assert "taken back" in after.text
    assert form_of(after)["pair"] == form_of(before)["pair"]
    assert read_choices(session.store.path) == []
    assert "nothing to take back" in client.post("/undo").text


def test_two_people_at_once(session):
    app = make_app(session)
    clients = [TestClient(app, base_url="http://localhost") for _ in range(2)]
    shown = [form_of(visit(client, name)) for client, name in zip(clients, ("ada", "bob"), strict=True)]
    assert shown[0]["pair"] != shown[1]["pair"]
    stolen = clients[1].post("/choose", data=shown[0] | {"verdict": "left"})
    assert "answered already" in stolen.text
    for client in clients:
        choose(client)
    assert [choice.who for choice in session.store.choices] == ["ada", "bob"]


def test_prompts_and_names_are_escaped(client):
    text = visit(client, "<img src=x onerror=alert(1)>").text
    assert "<img src=x" not in text
    assert unescape("&lt;img src=x onerror=alert(1)&gt;") in unescape(text)
    assert "<script>alert" not in text
    assert EVIL in unescape(text)
    for verdict in ("left", "right") * 4:
        choose(client, verdict)
    report = client.get("/report").text
    assert "<script>alert" not in report
    assert "<img src=x" not in report


@pytest.mark.parametrize(
    ("name", "kept"), [("  Ada \t Lovelace ", "Ada Lovelace"), ("Zoë", "Zoë"), ("x" * 60, "x" * 40)]
)
def test_names(client, session, name, kept):
    visit(client, name)
    choose(client)
    assert session.store.choices[0].who == kept


@pytest.mark.parametrize("name", ["", "   ", "a\0b", "\x1b[31m"])
def test_bad_names(client, name):
    answer = client.post("/", data={"name": name})
    assert answer.status_code == 400
    assert "Please give a name" in answer.text


def test_without_a_name_everything_leads_to_the_start(client):
    for answer in (client.get("/choose"), client.post("/choose", data={}), client.post("/undo")):
        assert answer.url.path == "/"


@pytest.mark.parametrize(
    "changes",
    [{"verdict": "best"}, {"verdict": ""}, {"pair": "-1"}, {"pair": "x"}, {"pair": "²"}, {"pair": "9" * 20}],
)
def test_forms_that_the_page_does_not_send(client, session, changes):
    visit(client)
    answer = choose(client, **changes)
    assert answer.status_code == 400
    assert "not as this page sends it" in answer.text
    assert not session.store.choices


@pytest.mark.parametrize("body", [b"\xff\xfe", b"a=1&" * 100, b"x" * 100_000, b""])
def test_bodies_that_are_no_form(client, session, body):
    visit(client)
    assert client.post("/choose", content=body).status_code == 400
    assert not session.store.choices


@pytest.mark.parametrize("milliseconds", ["", "abc", "-5", "1e3", "99999999999"])
def test_a_time_that_cannot_be_read_is_not_used(client, session, milliseconds):
    visit(client)
    assert choose(client, milliseconds=milliseconds).status_code == 200
    assert 0 <= session.store.choices[0].milliseconds < 60_000


@pytest.mark.parametrize(
    "path",
    [
        "/image/x",
        "/image/..%2f..%2fpairs.json",
        "/image/../pairs.json",
        "/image/%2e%2e/choices.jsonl",
        "/static/..%2fpage.py",
        "/static/../page.py",
        "/static/",
        "/pairs.json",
        "/choices.jsonl",
    ],
)
def test_paths_lead_nowhere(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "There is no such" in answer.text


def test_images_are_named_by_their_hash(client, session):
    text = visit(client).text
    addresses = re.findall(r'<img src="([^"]+)"', text)
    pair = session.question("ada").pair
    assert sorted(addresses) == sorted(f"/image/{digest}" for digest in pair.sha256)
    image = client.get(addresses[0])
    assert image.headers["content-type"] == "image/png"
    assert image.content in [path.read_bytes() for path in pair.images]
    assert "run" not in text.split("<main>")[1]  # nothing tells which model drew which image


def test_every_answer_forbids_other_hosts(client):
    for path in ("/", "/choose", "/report", "/static/label.css", "/nowhere"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; img-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
    for file in [*(page._FOLDER / "templates").iterdir(), *(page._FOLDER / "static").iterdir()]:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text()), file


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8100", "", "127.0.0.1.evil.example"])
def test_other_names_of_the_server(client, host):
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 400
    assert "--allowed-host" in answer.text


def test_allowed_names(session):
    client = TestClient(make_app(session, allowed_hosts=["Box.example"]), base_url="http://box.example:8100")
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8100"])
def test_forms_of_other_pages(client, session, origin):
    visit(client)
    form = form_of(client.get("/choose")) | {"verdict": "left"}
    answer = client.post("/choose", data=form, headers={"origin": origin})
    assert answer.status_code == 403
    assert not session.store.choices
    assert client.post("/choose", data=form, headers={"origin": "http://127.0.0.1:8100"}).status_code == 200
    assert len(session.store.choices) == 1


def test_the_token(session):
    app = make_app(session, token="SEC/RET+&?")
    client = TestClient(app, base_url="http://127.0.0.1:8100")
    for path in ("/", "/choose", "/report", "/image/x", "/?token=wrong"):
        answer = client.get(path)
        assert answer.status_code == 401, path
        assert "SEC" not in answer.text
    assert client.post("/", data={"name": "ada"}).status_code == 401
    assert client.get("/static/label.css").status_code == 200
    answer = client.get("/", params={"token": "SEC/RET+&?"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert visit(client).status_code == 200
    assert choose(client).status_code == 200
    assert len(session.store.choices) == 1


def test_an_answer_that_cannot_be_saved_says_so(client, session, monkeypatch):
    visit(client)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        answer = choose(client)
    assert answer.status_code == 507
    assert "was not saved" in answer.text
    assert "No space left on device" in answer.text
    assert choose(client).status_code == 200
    assert len(read_choices(session.store.path)) == 1


def test_disagreements_are_shown_as_images(tmp_path):
    make_pairs(tmp_path, 2)
    session = make_session(tmp_path, repeats=0, shared=1)
    app = make_app(session)
    for name, preferred in (("ada", 0), ("bob", 1)):
        client = TestClient(app, base_url="http://localhost")
        visit(client, name)
        for _ in range(2):
            left = session.question(name).left
            choose(client, "left" if left == preferred else "right")
    text = client.get("/report").text
    assert "0 of 2, 0%" in text
    assert text.count("<article>") == 2
    for digest in session.pairs[0].sha256:
        assert f'src="/image/{digest}"' in text


def test_methods(client):
    assert client.get("/undo").status_code == 405
    assert client.delete("/").status_code == 405

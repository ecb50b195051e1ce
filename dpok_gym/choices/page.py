"""The page on which people choose: a Starlette application, which ``dpok label`` serves.

It needs the extra ``label``. Everything on it comes from this server, and it works without JavaScript. It speaks plain
HTTP: on a network that you do not trust, put it behind a proxy with TLS.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from dpok_gym.choices.report import make_report
from dpok_gym.choices.session import VERDICTS, Session
from dpok_gym.choices.tables import report_tables
from dpok_gym.utils.files import WriteError
from dpok_gym.utils.serving import is_called_by, is_token, names_of_server, needs_extra

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Cookies of the person's name and of the token.
NAME_COOKIE, TOKEN_COOKIE = "dpok-label-name", "dpok-label-token"
#: Characters of a name, and bytes of a form.
MAX_NAME, MAX_FORM = 40, 8192
#: Images with a longer side of at most so many pixels are drawn with sharp pixels, and beside each other on a phone.
SMALL = 160
#: What the page says after a form that changed nothing.
_NOTES = {
    "answered": "That pair was answered already. Here is the next one.",
    "nothing": "There is nothing to take back.",
    "undone": "Your last answer is taken back. Choose again.",
}
_FOLDER = Path(__file__).parent
_HEADERS = {
    # Nothing of another host, no frames, and nothing that a prompt or a name could smuggle in.
    "content-security-policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    # Not "no-referrer": browsers would then send "Origin: null" with the page's own forms.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


def make_app(session: Session, *, token: str | None = None, allowed_hosts: Sequence[str] = ()) -> Starlette:
    """Makes the page, an ASGI application.

    ===================== ================================================================================
    request               answer
    ===================== ================================================================================
    ``GET /``             a form for the person's name, and what to do
    ``POST /``            takes the name, which a cookie keeps
    ``GET /choose``       the pair to choose from
    ``POST /choose``      takes an answer; the pair and the id of the question must be those that are asked
    ``POST /undo``        takes the person's last answer back
    ``GET /image/HASH``   an image of the pairs
    ``GET /report``       the results so far
    ``GET /static/NAME``  style and script
    ===================== ================================================================================

    Args:
        session: who is asked what.
        token: what ``?token=`` of the first address must be; a cookie keeps it. None lets everybody in who reaches the
            server.
        allowed_hosts: names by which browsers may call the server, beside "localhost", the name of this machine and all
            numeric addresses.

    Raises:
        ImportError: if the extra ``label`` is not installed.
    """
    with needs_extra("label"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.responses import FileResponse, HTMLResponse, RedirectResponse
        from starlette.routing import Route
    templates = Environment(loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True, undefined=StrictUndefined)
    templates.filters |= {"duration": _format_duration, "size_class": _size_class, "image_size": _image_size}
    images = {digest: path for pair in session.pairs for digest, path in zip(pair.sha256, pair.images, strict=True)}
    static = {path.name: path for path in (_FOLDER / "static").iterdir()}

    def show(template: str, status: int = 200, **values: Any) -> Response:
        text = templates.get_template(template).render(values)
        return HTMLResponse(text, status, {"cache-control": "no-store"})

    def go(path: str) -> Response:
        return RedirectResponse(path, 303)  # a reload then asks for the page, and does not answer again

    # A handler does all work on the session at once, so no other one comes in between. An answer takes as long as the
    # disk, some milliseconds.

    async def start(request: Request) -> Response:
        return show("start.html", name=_name_of(request), pairs=len(session.pairs), problem=None)

    async def take_name(request: Request) -> Response:
        name = _clean_name((await _read_form(request)).get("name", ""))
        if not name:
            problem = f"Please give a name of 1 to {MAX_NAME} letters."
            return show("start.html", 400, name="", pairs=len(session.pairs), problem=problem)
        response = go("/choose")
        response.set_cookie(NAME_COOKIE, quote(name, safe=""), 30 * 86400, httponly=True, samesite="lax")
        return response

    async def choose(request: Request) -> Response:
        who = _name_of(request)
        if not who:
            return go("/")
        question, progress = session.question(who), session.progress(who)
        note = _NOTES.get(request.query_params.get("note", ""))
        if question is None:
            path = session.store.path
            return show("done.html", who=who, progress=progress, note=note, path=path)
        pair, following = question.pair, session.following(who)
        sizes = [_image_size(image) for image in pair.images]
        sides = [
            (side, pair.sha256[k], sizes[k]) for side, k in (("left", question.left), ("right", 1 - question.left))
        ]
        return show(
            "choose.html",
            who=who,
            question=question,
            sides=sides,
            progress=progress,
            following=following.pair.sha256 if following else (),
            note=note,
        )

    async def take_choice(request: Request) -> Response:
        form, who = await _read_form(request), _name_of(request)
        if not who:
            return go("/")
        verdict, number, milliseconds = (form.get(name, "") for name in ("verdict", "pair", "milliseconds"))
        if verdict not in VERDICTS or not _is_number(number):
            raise HTTPException(400, "The form is not as this page sends it. Go back, and choose again.")
        measured = int(milliseconds) if _is_number(milliseconds) else None
        is_taken = session.answer(who, int(number), form.get("question", ""), verdict, measured)
        return go("/choose" if is_taken else "/choose?note=answered")

    async def undo(request: Request) -> Response:
        await _read_form(request)
        who = _name_of(request)
        return go(f"/choose?note={'undone' if session.undo(who) else 'nothing'}") if who else go("/")

    async def report(request: Request) -> Response:
        choices = list(session.store.choices)
        result = await run_in_threadpool(make_report, choices)
        known = [row for row in result.disagreements if row.sha256 and set(row.sha256) <= images.keys()]
        return show("report.html", tables=report_tables(result), disagreements=known, choices=len(choices))

    async def image(request: Request) -> Response:
        path = images.get(request.path_params["digest"])
        if path is None:
            raise HTTPException(404, "There is no such image.")
        kept = {"cache-control": "private, max-age=86400, immutable"}
        return FileResponse(path, media_type=f"image/{path.suffix[1:]}", headers=kept)

    async def style_or_script(request: Request) -> Response:
        path = static.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "There is no such file.")
        return FileResponse(path, headers={"cache-control": "no-cache"})

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: "There is no such page.", 405: "This page takes no such request."}.get(error.status_code)
        known = error.detail if error.status_code == 400 or text is None else text
        return show("message.html", error.status_code, title="That did not work", text=known)

    async def on_write_error(request: Request, error: Exception) -> Response:
        return show("message.html", 507, title="Your answer was not saved", text=f"{error}. Fix this, and go back.")

    return Starlette(
        routes=[
            Route("/", start),
            Route("/", take_name, methods=["POST"]),
            Route("/choose", choose),
            Route("/choose", take_choice, methods=["POST"]),
            Route("/undo", undo, methods=["POST"]),
            Route("/report", report),
            Route("/image/{digest}", image),
            Route("/static/{name}", style_or_script),
        ],
        middleware=[Middleware(_Door, token=token, names=names_of_server(*allowed_hosts), show=show)],
        exception_handlers={HTTPException: on_http_error, WriteError: on_write_error},
    )


class _Door:
    """Lets requests in that have the token, that call this server by its name, and that its own pages sent."""

    def __init__(self, app: ASGIApp, token: str | None, names: set[str], show: Any) -> None:
        self.app, self.token, self.names, self.show = app, token, names, show

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = self._answer(Request(scope)) or self.app
        await answer(scope, receive, send_safely)

    def _answer(self, request: Request) -> Response | None:
        """Returns the answer to a request that is not let in; None for one that is."""
        from starlette.responses import RedirectResponse

        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        title = "This page is closed"
        if not is_called_by(host, self.names):
            text = "The address names another server. The option --allowed-host of dpok label adds a name."
            return self.show("message.html", 400, title=title, text=text)
        if request.method not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc != host:
            return self.show(
                "message.html", 403, title=title, text="Another page sent this form. Open this page itself."
            )
        if self.token is None or request.url.path.startswith("/static/"):
            return None
        given = request.query_params.get("token")
        if given is not None and is_token(given, self.token) and request.method == "GET":
            response = RedirectResponse(request.url.path, 303)  # so that the token does not stay in the address
            # Not "strict": the cookie would be missing right after a link in a mail or a chat was followed.
            response.set_cookie(TOKEN_COOKIE, quote(self.token, safe=""), 30 * 86400, httponly=True, samesite="lax")
            return response
        if is_token(unquote(request.cookies.get(TOKEN_COOKIE, "")), self.token):
            return None
        text = "It needs a token: open the whole address that dpok label has printed, with ?token= at its end."
        return self.show("message.html", 401, title=title, text=text)


async def _read_form(request: Request) -> dict[str, str]:
    """Reads the fields of a form; of one that is too long, or no text, nothing."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM:
            return {}
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=20)
    except ValueError:
        return {}
    return {name: values[-1] for name, values in fields.items()}


def _name_of(request: Request) -> str:
    """Returns the name in the person's cookie; "" if there is none."""
    return _clean_name(unquote(request.cookies.get(NAME_COOKIE, "")))


def _clean_name(text: str) -> str:
    """Returns a name on one line, of at most 40 characters; "" if nothing is left of it."""
    name = " ".join(unicodedata.normalize("NFC", text).split())
    return name[:MAX_NAME].strip() if name.isprintable() else ""


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


@functools.lru_cache(4096)
def _image_size(path: Path) -> tuple[int, int]:
    """Returns width and height of an image."""
    from PIL import Image

    with Image.open(path) as image:  # it reads the header only
        return image.size


def _size_class(images: tuple[Path, Path]) -> str:
    """Returns the class that the style knows a pair by."""
    return "small" if max(max(_image_size(image)) for image in images) <= SMALL else "large"


def _format_duration(seconds: float) -> str:
    """Returns 75 as "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

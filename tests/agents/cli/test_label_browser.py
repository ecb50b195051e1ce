"""``dpok label`` in a real browser: by mouse, by keyboard, on a phone, without JavaScript, and after a kill.

They need a Chromium; where there is none, the reason of the skip says so.
"""

import threading

import numpy as np
import pytest
from PIL import Image

from dpok_gym.choices.pairs import read_pairs, read_settings, write_pairs
from dpok_gym.choices.records import read_choices
from tests.browser import finish, visiting, wait_for
from tests.browser import serving as serving_page
from tests.dpok_gym.choices.support import make_pairs

pytestmark = pytest.mark.slow
#: Pairs of a round; the fifth one comes again at the end.
N_PAIRS = 6


@pytest.fixture
def folder(tmp_path):
    """A folder of pairs."""
    make_pairs(tmp_path, N_PAIRS, "three green squares")
    return tmp_path


def serving(folder, port=0):
    """Runs ``dpok label`` on the pairs of a folder."""
    return serving_page(["--out", str(folder)], port)


def answers(folder):
    """Returns what the file says about each choice: the side that was chosen, or why none was."""
    found = []
    for choice in read_choices(folder / "choices.jsonl"):
        side = "left" if choice.preferred == choice.left else "right"
        found.append(choice.reason or side)
    return found


def test_by_mouse(folder, browser):
    buttons = ["The left image is better", "The right image is better", "tie", "both bad", "skip"]
    with serving(folder) as (_, address), visiting(browser, address) as page:
        assert page.get_by_role("heading", name="three green squares").is_visible()
        for done, name in enumerate([*buttons, "The left image is better"]):
            wait_for(page, done)
            page.get_by_role("button", name=name).click()
        # The fifth pair was skipped, and what was skipped does not come again.
        finish(page)
        page.get_by_role("button", name="Undo my last answer").click()
        page.get_by_role("button", name="The right image is better").click()
        finish(page)
        page.get_by_role("link", name="See the results").click()
        assert page.get_by_role("cell", name="Ada").first.is_visible()
    assert answers(folder) == ["left", "right", "tie", "both-bad", "skip", "right"]


def test_by_keyboard(folder, browser):
    with serving(folder) as (_, address), visiting(browser, address) as page:
        keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "u", "t", "ArrowDown", "b", "s"]
        for key in keys:
            before = page.locator("input[name=question]").get_attribute("value")
            page.keyboard.press(key)
            page.wait_for_function("id => document.querySelector('input[name=question]')?.value !== id", arg=before)
            page.wait_for_load_state()  # or else the script does not hear the next key yet
        page.keyboard.press("Control+ArrowLeft")  # the browser's own keys do nothing here
        assert answers(folder) == ["left", "right", "tie", "both-bad", "both-bad", "skip"]
        page.get_by_role("button", name="The left image is better").focus()
        page.keyboard.press("Enter")  # the repeat of the fifth pair
        finish(page)
    choices = read_choices(folder / "choices.jsonl")
    assert answers(folder)[-1] == "left"
    assert choices[-1].repeat_of == choices[4].id
    assert {choices[-1].left, choices[4].left} == {0, 1}
    assert all(0 < (choice.milliseconds or 0) < 60_000 for choice in choices)


def test_on_a_phone(folder, browser):
    phone = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}
    with serving(folder) as (_, address), visiting(browser, address, **phone) as page:
        for done in range(N_PAIRS):
            wait_for(page, done)
            assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing to scroll sideways
            boxes = [button.bounding_box() for button in page.locator("button").all()]
            assert min(min(box["height"], box["width"]) for box in boxes) >= 44  # large enough for a thumb
            left, right = (box for box in boxes[:2])
            assert left["y"] == right["y"]  # small images are beside each other
            page.get_by_role("button", name="The right image is better").tap()
        wait_for(page, N_PAIRS)
        page.get_by_role("button", name="The left image is better").tap()  # the fifth pair again
        finish(page)
        for path in ("/report", "/"):
            page.goto(address + path)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert answers(folder) == ["right"] * N_PAIRS + ["left"]


def test_large_images_are_above_each_other_on_a_phone(folder, browser):
    pairs = read_pairs(folder)
    for image in (image for pair in pairs for image in pair.images):
        Image.fromarray(np.full((512, 512, 3), 90, np.uint8)).save(image)
    write_pairs(folder, read_settings(folder), pairs)
    with serving(folder) as (_, address):
        for width, is_stacked in ((1280, False), (390, True)):
            with visiting(browser, address, viewport={"width": width, "height": 800}) as page:
                left, right = (page.locator(".image").nth(k).bounding_box() for k in (0, 1))
                assert (left["x"] == right["x"]) == is_stacked
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert page.get_by_text("upper").is_visible() == is_stacked
                if is_stacked:
                    page.keyboard.press("ArrowDown")
                    wait_for(page, 1)
        assert answers(folder)[0] == "right"  # the lower one


def test_without_javascript(folder, browser):
    with serving(folder) as (_, address), visiting(browser, address, java_script_enabled=False) as page:
        for name in ["The left image is better", "tie", "undo", "both bad", "skip", "The right image is better"]:
            page.get_by_role("button", name=name).click()
        wait_for(page, 4)  # a page that is still on its way cannot be reloaded
        page.reload()  # asks the same again, and answers nothing
        wait_for(page, 4)
        for _ in range(3):
            page.get_by_role("button", name="The left image is better").click()
        finish(page)
    assert answers(folder) == ["left", "both-bad", "skip", "right", "left", "left", "left"]


def test_a_double_click_answers_once(folder, browser):
    with serving(folder) as (_, address), visiting(browser, address) as page:
        sent, clicked = [], threading.Event()

        def hold(route):
            sent.append(route)
            if clicked.is_set():
                route.continue_()

        page.route("**/choose", hold)
        box = page.get_by_role("button", name="tie").bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        with page.expect_request("**/choose"):
            page.mouse.click(*middle)
        page.mouse.click(*middle)  # the first answer is held back, so this meets the same page
        clicked.set()
        for route in [*sent]:
            route.continue_()
        wait_for(page, 1)
        assert len(sent) == 1
        assert answers(folder) == ["tie"]
        other_tab = page.context.new_page()
        other_tab.goto(f"{address}/choose")
        page.get_by_role("button", name="tie").click()
        wait_for(page, 2)
        other_tab.get_by_role("button", name="both bad").click()  # of a pair that was answered meanwhile
        other_tab.get_by_text("That pair was answered already").wait_for()
        assert answers(folder) == ["tie", "tie"]


def test_a_kill_loses_nothing(folder, browser):
    with serving(folder) as (process, address), visiting(browser, address, may_lose=True) as page:
        for key in ("left", "right", "left"):
            page.get_by_role("button", name=f"The {key} image is better").click()
        wait_for(page, 3)
        before = answers(folder)
        process.kill()
        process.wait()
        assert answers(folder) == before == ["left", "right", "left"]
        with serving(folder, port=int(address.rpartition(":")[2])):
            # The page that was open before the kill still takes the answer to what it shows.
            page.get_by_role("button", name="tie").click()
            wait_for(page, 4)
            page.get_by_role("button", name="The right image is better").click()
            page.get_by_role("button", name="The right image is better").click()
            page.get_by_role("button", name="The right image is better").click()
            finish(page)
    assert answers(folder) == ["left", "right", "left", "tie", "right", "right", "right"]

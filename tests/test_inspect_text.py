"""`calm inspect`: the candidates of each patch, their weights at every T, the printed text, the page in a browser."""

import contextlib
from dataclasses import asdict

import pytest
import torch
from browser import complaints, needs_browser, requests, set_width
from commands import ROOT, refusal
from tiny import BOS, tiny_model, tiny_tokenizer

from calm_transformers.loading import load_calm
from calm_transformers.model.generation_calm_algorithms import Truncation
from calm_transformers.pages import inspect_page, inspect_text

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def demo():
    return load_calm(str(ROOT), "cpu")


@pytest.fixture(scope="module")
def story(demo):
    """An inspected text of the demo model, and the output of generate with the same seed."""
    model, tokenizer = demo
    inspection = inspect_text.inspect_text(model, tokenizer, PROMPT, 15, seed=3, temperature=0.5)
    inspection.model = "a name"
    settings = {"do_sample": True, "temperature": 0.5, "sampling_method": "batch", "max_new_tokens": 15}
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, **settings, generator=torch.Generator().manual_seed(3))
    return inspection, tokenizer.decode(ids[0])


def test_the_text_equals_generate_and_each_patch_is_among_its_candidates(story):
    inspection, expected = story
    assert inspection.text == expected
    generated = [patch for patch in inspection.patches if not patch.is_prompt]
    assert len(generated) == 8
    for patch in generated[:-1]:
        assert patch.candidates[patch.chosen].text == patch.text
        assert sum(candidate.count for candidate in patch.candidates) == inspection.settings["num_candidates"]
        assert sum(candidate.weight for candidate in patch.candidates) == pytest.approx(1, abs=1e-5)
        weights = [candidate.weight for candidate in patch.candidates]
        assert weights == sorted(weights, reverse=True)


def test_prompt_patches_have_candidates_sampled_after_the_patches_before_them(story):
    first, *_, last = [patch for patch in story[0].patches if patch.is_prompt]
    assert first.candidates == [] and first.chosen is None
    candidate = last.candidates[last.chosen]  # most stories begin like that
    assert candidate.text == last.text and candidate.count > 150


def test_prompts_of_any_length_are_padded_on_the_left():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompt = "0123456789" * 5  # with <s> 51 tokens: 13 patches of 4, one of them with a filler
    inspection = inspect_text.inspect_text(model, tokenizer, prompt, 4, seed=0, num_candidates=4, temperature=0.5)
    patches = [patch for patch in inspection.patches if patch.is_prompt]
    assert [patch.text for patch in patches] == ["<s>01", *(prompt[i : i + 4] for i in range(2, 50, 4))]
    assert [bool(patch.candidates) for patch in patches] == [False, *[True] * 12]


def test_at_temperature_1_all_candidates_are_sampled(demo):
    inspection = inspect_text.inspect_text(*demo, PROMPT, 4, seed=0, temperature=1.0, num_candidates=30)
    for patch in inspection.patches[1:]:
        assert sum(candidate.count for candidate in patch.candidates) == 30
        assert all(each.weight == pytest.approx(each.count / 30, abs=1e-6) for each in patch.candidates)


def test_weights_of_counts():
    for top_k, weights in ((0, [10 / 13, 3 / 13, 0]), (1, [1, 0, 0])):  # C(c, 2)
        assert inspect_text.weights_from_counts([5, 3, 1], 0.5, Truncation(top_k)) == pytest.approx(weights)


def test_an_empty_prompt_starts_with_bos_or_raises():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    for bos in (BOS, None):
        model.generation_config.bos_token_id = bos
        with contextlib.nullcontext() if bos else pytest.raises(ValueError, match="empty prompt"):
            inspection = inspect_text.inspect_text(model, tokenizer, "", 4, seed=0, num_candidates=4, temperature=0.5)
    assert [patch.is_prompt for patch in inspection.patches] == [True, False]


def test_the_command_prints_patches_with_their_weights_at_several_temperatures(tiny_folder, capsys):
    options = ["--max_new_tokens", "8", "--num_candidates", "20", "--temperature", "0.7", "--show", "2"]
    assert inspect_text.main([str(tiny_folder), "Hello", *options]) == 0
    printed = capsys.readouterr().out
    assert "temperature = 0.7, num_candidates = 20" in printed
    assert all(name in printed for name in ("T=1", "T=0.7*", "T=0.5", "T=0.333"))
    assert printed.count("    > ") >= 2 and "… and " in printed
    assert printed.startswith(f"{tiny_folder.name}: K = 4") and "<s>Hel" in printed


@pytest.mark.parametrize(
    "options, message",
    [
        (["--compare", "0"], "temperature=0.0: sampling needs"),
        (["--max_new_tokens", "5000000"], "the prompt has 6 tokens and 5000000 are to be written"),
    ],
)
def test_errors_are_one_sentence(tiny_folder, capsys, options, message):
    assert message in refusal(capsys, inspect_text.main, tiny_folder, "Hello", *options)


@pytest.fixture
def page(driver, story, tmp_path):
    path = tmp_path / "story.html"
    inspect_text.write_page(path, story[0])
    set_width(driver, 1200, 900)
    requests(driver), complaints(driver)
    driver.get(path.as_uri())
    return path


def hover(driver, number):
    from selenium.webdriver import ActionChains

    spans = driver.find_elements("css selector", "#text .patch")
    ActionChains(driver).move_to_element(spans[number]).perform()
    return spans[number]


@needs_browser
@pytest.mark.slow
@pytest.mark.transformers
class TestPage:
    def test_it_makes_no_other_request_and_fits_a_phone(self, driver, page):
        assert requests(driver) == [page.as_uri()] and complaints(driver) == []
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        set_width(driver, 360, 740)
        driver.refresh()
        assert driver.title == driver.find_element("id", "title").text == "a name: a text, patch by patch"
        assert "a patch of 2 tokens per step" in driver.find_element("css selector", "header p").text
        assert driver.find_element("id", "text").text.startswith("<|bos|>Once")
        assert driver.find_element("id", "slider").size["height"] >= 44  # a finger's
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        assert driver.execute_script("return getComputedStyle(document.getElementById('panel')).position") == "fixed"

    def test_patches_show_their_candidates_on_hover_with_weights_by_the_slider(self, driver, page, story):
        patches = story[0].patches
        spans = driver.find_elements("css selector", "#text .patch")
        assert [span.get_property("textContent") for span in spans] == [patch.text for patch in patches]
        number = next(i for i, patch in enumerate(patches) if patch.candidates and patch.candidates[0].weight < 0.99)
        for place in (2, number):
            span = hover(driver, place)
            first = driver.find_element("css selector", "#panel tbody code").get_property("textContent")
            assert first == patches[place].candidates[0].text
            chosen = driver.find_elements("css selector", "#panel tr.chosen code")
            assert [code.get_property("textContent") for code in chosen] == [patches[place].text]
        slide = "slider.value = arguments[0]; slider.dispatchEvent(new Event('input'));"
        counts, seen = [candidate.count for candidate in patches[number].candidates], set()
        for temperature in (0.2, 0.5, 1.0):
            driver.execute_script(slide, temperature)
            cell = driver.find_element("css selector", "#panel .weight").text
            expected = inspect_text.weights_from_counts(counts, temperature, Truncation())[0]
            assert float(cell.removesuffix(" %")) == pytest.approx(100 * expected, abs=0.051)
            seen.add((cell, span.value_of_css_property("--weight")))
        assert len(seen) == 3

    @pytest.mark.parametrize("truncation", [Truncation(), Truncation(3, 0.9, 0.05), Truncation(top_p=0.6)])
    def test_its_weights_equal_the_sampler_s(self, driver, page, truncation):
        for counts in ([40, 20, 7, 3, 2, 2, 1, 1, 1, 1], [1, 1, 1], [12], [3, 3, 2]):
            for temperature in (2.0, 1.3, 1.0, 0.7, 1 / 3, 0.1):
                arguments = counts, temperature, truncation._asdict()
                weights = driver.execute_script("return candidateWeights(...arguments)", *arguments)
                expected = inspect_text.weights_from_counts(counts, temperature, truncation)
                assert weights == pytest.approx(expected, abs=2e-5), (counts, temperature)

    def test_no_text_can_close_its_script(self, driver, story, tmp_path):
        data = asdict(story[0])
        data["patches"][1]["text"] = "</script><script>document.title = 'broken out'</script>\n<b>"
        path = tmp_path / "odd.html"
        path.write_text(inspect_page.render_page(data), encoding="utf-8")
        driver.get(path.as_uri())
        spans = driver.find_elements("css selector", "#text .patch")
        assert spans[1].get_property("textContent") == data["patches"][1]["text"]
        assert driver.title != "broken out"

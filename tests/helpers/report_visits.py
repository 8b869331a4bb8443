"""A report in a browser, with what it asked for and complained of."""

from __future__ import annotations

SHOWN = "figure => document.getElementById(`${figure}-plot`)._fullData.map(trace => trace.visible === true)"


class Visit:
    """A page in the browser, with what it asked for and complained of."""

    def __init__(self, tab):
        self.tab, self.requests, self.errors = tab, [], []
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        tab.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str):
        self.tab.goto(url)
        self.tab.wait_for_selector("html[data-drawn]", timeout=60_000)
        return self.tab

    def figures(self) -> list[str]:
        """The names of the page's figures."""
        return self.tab.evaluate("Object.keys(page.figures)")

    def check_figures(self) -> None:
        """Hold every figure to be drawn, with something in it and words beside it."""
        assert self.figures()
        for name in self.figures():
            plot = self.tab.locator(f"#{name}-plot")
            assert plot.locator("svg.main-svg").count() >= 1
            drawn = plot.locator(".scatterlayer .trace, .heatmaplayer image, .barlayer .trace").count()
            assert drawn > 0, f"{name} is empty"
            words = self.tab.locator(f"#{name}-words").inner_text()
            assert plot.get_attribute("aria-labelledby") == f"{name}-words" and len(words) > 20

    def shown(self, figure: str) -> list[bool]:
        """Which traces of a figure are drawn."""
        return self.tab.evaluate(SHOWN, figure)

    def settled(self, figure: str, before: list[bool]) -> list[bool]:
        """What is shown once it is no longer what it was."""
        check = f"([figure, before]) => JSON.stringify(({SHOWN})(figure)) !== JSON.stringify(before)"
        self.tab.wait_for_function(check, arg=[figure, before], timeout=60_000)
        return self.shown(figure)

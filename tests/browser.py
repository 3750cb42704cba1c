"""A page in headless Chromium: a script clicks on a copy of it, and what it reads comes back."""
import html
import json
import re
import subprocess

import pytest

WATCH = """<script>
(async () => {
  const read = {}, wait = ms => new Promise(done => setTimeout(done, ms));
  const at = id => document.getElementById(id), chip = (id, n) => at(id).children[n - 1];
  const number = id => Number(at(id).textContent.replace("%", ""));
  try {
    while (!document.documentElement.dataset.ready) await wait(20);
    SCRIPT
  } catch (error) { read.error = String(error); }
  const out = document.createElement("pre");
  out.id = "read";
  out.textContent = JSON.stringify(read);
  document.body.append(out);
})();
</script>"""


def read_page(page, folder, script: str, fragment: str = "", *flags: str) -> dict:
    """page: an index.html; script: JavaScript that fills the object `read`, which is returned."""
    copy = folder / "page.html"
    copy.write_text(page.read_text(encoding="utf-8") + WATCH.replace("SCRIPT", script))
    try:
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *flags,
             f"--user-data-dir={folder / 'chromium'}", "--virtual-time-budget=20000",
             f"file://{copy}{fragment}"], capture_output=True, text=True, timeout=200)
    except FileNotFoundError:
        pytest.skip("there is no chromium here; make test-page installs it")
    found = re.search(r'<pre id="read">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    read = json.loads(html.unescape(found[1]))
    assert "error" not in read, read["error"]
    return read

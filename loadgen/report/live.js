// Asks for what is new each second; keeps what the reader has opened, has selected and stands on. Once the run has ended it loads the report.
const main = document.querySelector("main");

async function look() {
  try {
    const reply = await fetch("/live", { cache: "no-store" });
    const html = await reply.text();
    if (html.startsWith("<!doctype")) return location.reload();
    if (reply.ok && getSelection().isCollapsed) show(html);
  } catch {
    document.querySelector("h1").textContent = "The run has ended: its report is report.html in its folder";
    return;
  }
  setTimeout(look, 1000);
}

function show(html) {
  const open = [...main.querySelectorAll("details[open]")].map((each) => each.id);
  const stood = document.activeElement.tagName === "SUMMARY" ? document.activeElement.parentNode.id : null;
  main.innerHTML = html;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  if (stood) document.getElementById(stood)?.querySelector("summary").focus();
}

setTimeout(look, 1000);

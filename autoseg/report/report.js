"use strict";
for (const plane of document.querySelectorAll(".plane")) {
  const input = plane.querySelector("input"), picture = plane.querySelector("img");
  const slices = plane.querySelectorAll("svg"), places = input.dataset.mm.split(" ");
  const text = plane.querySelector("output");
  const show = () => {
    const at = Number(input.value);
    picture.style.setProperty("--at", at);
    slices.forEach((slice, i) => slice.toggleAttribute("hidden", i !== at));
    const words = `slice ${at + 1} of ${slices.length}, ${places[at]} mm`;
    text.textContent = words;
    input.setAttribute("aria-valuetext", words);
  };
  input.addEventListener("input", show);
  plane.querySelector(".frame").addEventListener("wheel", (event) => {
    if (slices.length < 2 || event.ctrlKey) return;
    event.preventDefault();
    input.value = Number(input.value) + Math.sign(event.deltaY);
    show();
  }, { passive: false });
  show();
}
for (const name of ["truth", "pred"]) {
  const box = document.getElementById("show-" + name);
  if (box) {
    const apply = () => document.body.classList.toggle("no-" + name, !box.checked);
    box.addEventListener("change", apply);
    apply();
  }
}
// On paper everything is unfolded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
if ("live" in document.body.dataset) {
  const key = "autoseg-scroll";
  try { scrollTo(0, Number(sessionStorage.getItem(key) || 0)); } catch { /* no storage */ }
  let known = null;
  const look = async () => {
    const word = document.getElementById("live");
    try {
      const state = await (await fetch("version", { cache: "no-store" })).text();
      if (known !== null && known !== state) {
        try { sessionStorage.setItem(key, scrollY); } catch { /* no storage */ }
        location.reload();
      }
      known = state;
      word.textContent = "Live.";
    } catch {
      word.textContent = "The server has ended.";
    }
  };
  look();
  setInterval(look, 3000);
}

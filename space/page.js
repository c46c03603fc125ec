// Brings a result to life; gradio runs this once, with the result's `element` and `watch`.
const reduced = window.matchMedia("(prefers-reduced-motion: reduce)");
const PAUSE = 1300; // ms between frames
let timer = 0;

function bringToLife() {
  clearInterval(timer);
  const player = element.querySelector(".sd-player");
  if (!player) return;
  const frames = [...player.querySelectorAll(".sd-frame")];
  const [controls, range, output] = [".sd-controls", "input", "output"].map((name) => player.querySelector(name));
  const play = player.querySelector('[data-do="play"]');
  let at = 0;

  const show = (index) => {
    at = Math.max(0, Math.min(frames.length - 1, index));
    frames.forEach((frame, place) => (frame.hidden = place !== at));
    range.value = at + 1;
    output.textContent = `${at + 1} of ${frames.length}`;
    if (at === frames.length - 1) stop();
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = at === frames.length - 1 ? "Replay" : "Play";
  };
  const start = () => {
    clearInterval(timer);
    if (at === frames.length - 1) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => (player.isConnected ? show(at + 1) : clearInterval(timer)), PAUSE);
  };

  // All frames lie in one cell, so that the page does not jump from frame to frame.
  player.classList.add("sd-live");
  controls.hidden = false;
  // Set and not added: a new result may reuse the elements of the last one, and what was set on them goes.
  play.onclick = () => (timer ? stop() : start());
  for (const [name, by] of [["back", -1], ["on", 1]]) {
    player.querySelector(`[data-do="${name}"]`).onclick = () => (show(at + by), stop());
  }
  range.oninput = () => (show(Number(range.value) - 1), stop());
  // Where motion is not wanted nothing moves by itself: the last frame, and the controls to look at the others.
  show(reduced.matches ? frames.length - 1 : 0);
  if (!reduced.matches) start();
}

function bringIntoView() {
  if (element.getBoundingClientRect().top < window.innerHeight * 0.8) return;
  element.scrollIntoView({ behavior: reduced.matches ? "auto" : "smooth", block: "start" });
}

watch("value", () => {
  bringToLife();
  bringIntoView();
});

// Read out when they change; they are there from the start, as screen readers want it.
for (const id of ["sd-status", "sd-tools-status"]) {
  const place = document.getElementById(id);
  place?.setAttribute("role", "status");
  place?.setAttribute("aria-live", "polite");
}

// Enter in the request asks; in the tools, where Enter breaks a line, Ctrl or Cmd and Enter does.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.getElementById("sd-ask")?.click();
  }
});

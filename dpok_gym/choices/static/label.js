"use strict";
// Keys, the time that a choice takes, and the images of the next pair. Without this script the page works as well.
(() => {
  const next = document.currentScript.dataset.next.split(" ").filter(Boolean);
  const form = document.getElementById("choose");
  const keys = {
    ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", t: "tie", ArrowDown: "both-bad", b: "both-bad", s: "skip",
  };
  // In a narrow window, large images are above each other.
  const keysOfStacked = { ...keys, ArrowUp: "left", ArrowDown: "right" };
  let sent = false;
  let shown = null;

  const images = [...form.querySelectorAll("img")];
  Promise.allSettled(images.map((image) => image.decode())).then(() => {
    shown = performance.now();
    for (const address of next) new Image().src = address;
  });

  const once = (event) => {
    if (sent) event.preventDefault();
    sent = true;
  };
  form.addEventListener("submit", (event) => {
    if (shown !== null) form.elements.milliseconds.value = Math.round(performance.now() - shown);
    once(event);
  });
  document.getElementById("undo").addEventListener("submit", once);
  // A page that the browser's "back" shows again can be used again.
  addEventListener("pageshow", () => { sent = false; });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const isStacked = new Set(images.map((image) => image.getBoundingClientRect().left)).size === 1;
    const verdicts = isStacked ? keysOfStacked : keys;
    const button = key === "u"
      ? document.getElementById("undo-button")
      : verdicts[key] && form.querySelector(`button[value="${verdicts[key]}"]`);
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
  });
})();

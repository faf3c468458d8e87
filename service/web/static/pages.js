// What every page does beyond HTML: times in the reader's zone, uploads that show how far they are, another row of skills.
"use strict";

document.documentElement.classList.add("js");

function localTimes() {
  const form = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });
  const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
  const today = new Date().toDateString();
  for (const time of document.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    const precise = moment.toDateString() === today ? clock : exact;
    const said = (time.className === "exact" ? precise : form).format(moment);
    if (time.textContent !== said) {
      time.textContent = said;
      time.title = moment.toISOString();
    }
  }
  for (const option of document.querySelectorAll("option[data-time]")) {
    option.textContent = option.textContent.replace(/[-\d]{10} [:\d]{5} UTC/, form.format(new Date(option.dataset.time)));
  }
}
localTimes();
document.addEventListener("htmx:after:swap", localTimes);

// Who was at a button that is gone now is at the state that took its place, not at the top of the page.
let focused = null;
document.addEventListener("htmx:before:swap", () => (focused = document.activeElement));
document.addEventListener("htmx:after:swap", () => {
  if (focused && !focused.isConnected && document.activeElement === document.body) document.getElementById("state")?.focus();
});

// What is shown stays when the server is away or somebody has logged out: then the whole page is asked for, which says so.
document.addEventListener("htmx:before:swap", (event) => {
  const { response } = event.detail.ctx;
  if (response.raw.redirected || response.status === 401) location.reload();
  if (response.raw.redirected || response.status >= 400) event.preventDefault();
});

// Sent by XMLHttpRequest, since fetch does not say how much of a body has gone. The API answers instead of the page: with the id
// of what was made, or a problem.
for (const form of document.querySelectorAll("form[data-upload]")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const button = event.submitter;
    const told = button.closest("details").querySelector(".told");
    const bar = document.createElement("progress");
    const words = document.createElement("span");
    bar.setAttribute("aria-label", "Sent");
    told.className = "told";
    told.replaceChildren(bar, words);
    button.disabled = true;
    const request = new XMLHttpRequest();
    request.open("POST", form.getAttribute("action").replace("/ui", ""));
    request.responseType = "json";
    request.upload.onprogress = ({ loaded, total }) => {
      bar.max = total;
      bar.value = loaded;
      words.textContent = loaded < total ? `${Math.floor((100 * loaded) / total)}% sent` : "sent; it is being checked";
    };
    const refuse = (sentence) => {
      button.disabled = false;
      told.className = "told refusal";
      told.textContent = sentence;
    };
    request.onerror = () => refuse("The connection broke: send it again.");
    request.onload = () => {
      const made = request.response;
      if (request.status !== 201) refuse(made?.detail ?? `The server answered ${request.status}.`);
      else if (form.dataset.upload.startsWith("/")) location.assign(form.dataset.upload + made.id);
      else {
        const select = document.getElementById(form.dataset.upload);
        const words = `${made.name} · new · …${made.id.slice(-6)}`;
        select.add(new Option(words, made.id, true, true), 1);
        const others = '[name="skill_dataset"]';
        const row = document.querySelector("#skills template").content;
        for (const other of [...document.querySelectorAll(others), ...row.querySelectorAll(others)]) {
          if (select.id === "target") other.add(new Option(words, made.id));
        }
        button.disabled = false;
        told.textContent = `${made.name} is here, and picked.`;
        select.dispatchEvent(new Event("input", { bubbles: true }));
      }
    };
    const body = new FormData(form);
    for (const name of ["to_new", "base", "target"]) body.delete(name);
    request.send(body);
  });
}

// The form of a new job says at the field what its plan was refused for. What was wrong before is mended by then.
function markWrong() {
  const form = document.getElementById("new");
  if (!form) return;
  const said = form.parentElement.querySelector("#plan [data-field]");
  for (const old of document.querySelectorAll("#refused, #wrong")) old.remove();
  const describes = (field) => (field.getAttribute("aria-describedby") ?? "").split(" ").filter((id) => id && id !== "wrong");
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.setAttribute("aria-describedby", describes(field).join(" "));
  }
  const field = said?.dataset.field && document.getElementById(said.dataset.field);
  if (!field) return;
  const words = document.createElement("p");
  words.id = words.className = "wrong";
  words.textContent = said.textContent;
  (field.closest(".row, label") ?? field).after(words);
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", [...describes(field), "wrong"].join(" "));
}
document.addEventListener("htmx:after:swap", markWrong);

const adding = document.getElementById("add-skill");
if (adding) {
  adding.hidden = false;
  adding.addEventListener("click", () => {
    const template = document.querySelector("#skills template");
    template.before(template.content.cloneNode(true));
    localTimes();
    template.previousElementSibling.querySelector("input").focus();
  });
}

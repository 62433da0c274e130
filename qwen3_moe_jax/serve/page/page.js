// The chat. State is a list of messages; a message of the assistant keeps what it thought and called.

import { highlighted, rendered } from "./markdown.js";
import { draw } from "./heatmap.js";

const $ = (id) => document.getElementById(id);
const HEATMAP_MS = 2000;
let messages = [], running = null, context = 0, lastHeatmap = -Infinity, heatmapBusy = false;

const key = () => sessionStorage.getItem("key") || "";
const headers = () => ({ "content-type": "application/json", ...(key() ? { authorization: `Bearer ${key()}` } : {}) });

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.status === 401) {
    await askKey();
    return ask(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error?.message || `the server answered ${response.status}`);
  }
  return response;
}

function askKey() {
  const dialog = $("key-dialog");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => { sessionStorage.setItem("key", $("key").value); resolve(); }, { once: true });
  });
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function button(text, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function show() {
  $("talk").replaceChildren(...messages.map((message, i) => view(message, i)));
  scroll(true);
}

function view(message, index) {
  const body = element("div", "body"), tools = element("div", "tools");
  const whole = element("article", `message ${message.role}`, body, tools);
  if (message.role === "user") {
    body.textContent = message.content;
    tools.append(button("Edit", () => edit(index)));
  } else {
    fill(body, message);
    tools.append(button("Retry", () => retry(index)), button("Copy", () => navigator.clipboard?.writeText(message.content)));
  }
  message.body = body;
  return whole;
}

function fill(body, message) {
  const parts = [];
  if (message.reasoning) {
    const fold = element("details", "thinking", element("summary", "", "Thinking"), element("div", "", message.reasoning));
    fold.open = !!body.querySelector("details.thinking")?.open;
    parts.push(fold);
  }
  parts.push(rendered(message.content));
  for (const call of message.calls) parts.push(callView(message, call));
  if (message.error) parts.push(element("p", "error", message.error));
  body.replaceChildren(...parts);
}

function callView(message, call) {
  const fold = element("details", "call", element("summary", "", `Tool call: ${call.name}`), element("pre", "", highlighted(call.arguments)));
  fold.open = true;
  if (call.result !== undefined) fold.append(element("pre", "result", call.result));
  else if (!message.isRunning) {
    const result = element("input", "result");
    result.placeholder = "What the tool answers";
    const form = element("form", "", result, element("button", "", "Send result"));
    form.addEventListener("submit", (event) => { event.preventDefault(); call.result = result.value; answered(message); });
    fold.append(form);
  }
  return fold;
}

function answered(message) { // when every call has its result, the model goes on
  show();
  if (running || message.calls.some((call) => call.result === undefined)) return;
  answer();
}

function tools() { // functions, in whichever of the usual forms they were given
  $("tools-note").textContent = "";
  const text = $("tools").value.trim();
  if (!text) return {};
  try {
    const given = JSON.parse(text);
    const list = (Array.isArray(given) ? given : [given]).map((tool) => (tool.function ? tool : { type: "function", function: tool }));
    return { tools: list };
  } catch (error) {
    $("tools-note").textContent = `Tools are left out: ${error.message}`;
    return {};
  }
}

function sentForm(message) { // a message and the results of its calls, as the API takes them
  const { role, content, reasoning, calls = [] } = message;
  const whole = { role, content, ...(reasoning ? { reasoning_content: reasoning } : {}) };
  if (!calls.length) return [whole];
  whole.tool_calls = calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  return [whole, ...calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result ?? "" }))];
}

function scroll(always) {
  const talk = $("talk"), isNear = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120;
  if (always || isNear) talk.scrollTop = talk.scrollHeight;
}

function edit(index) {
  if (running) return;
  $("text").value = messages[index].content;
  messages = messages.slice(0, index);
  show();
  $("text").focus();
}

function retry(index) {
  if (running) return;
  messages = messages.slice(0, index);
  answer();
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((l) => l.startsWith("data: ")).map((l) => l.slice(6)).join("");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(message, delta) {
  message.reasoning += delta.reasoning_content || "";
  message.content += delta.content || "";
  for (const call of delta.tool_calls || []) {
    message.calls[call.index] ??= { id: call.id, name: call.function.name, arguments: "" };
    message.calls[call.index].arguments += call.function.arguments || "";
  }
}

async function answer() {
  const message = { role: "assistant", content: "", reasoning: "", calls: [], error: "", isRunning: true };
  const sent = messages.flatMap(sentForm);
  messages.push(message);
  show();
  running = new AbortController();
  toggle();
  let tokens = 0, began = 0;
  try {
    const body = { messages: sent, stream: true, stream_options: { include_usage: true }, enable_thinking: $("thinking").checked, ...tools() };
    const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: running.signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) figures(event.usage.total_tokens, event.usage.completion_tokens, began);
      const delta = event.choices?.[0]?.delta;
      if (!delta) continue;
      take(message, delta);
      if (delta.content || delta.reasoning_content || delta.tool_calls) { began ||= performance.now(); tokens += 1; }
      if (tokens % 8 === 1) figures(null, tokens, began);
      paint(message);
      heat(message, false);
    }
  } catch (error) {
    if (error.name !== "AbortError") message.error = error.message;
  } finally {
    running = null;
    message.isRunning = false;
    toggle();
    fill(message.body, message);
    scroll(false);
    heat(message, true);
  }
}

let painting = false;
function paint(message) { // at most once a frame
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => { painting = false; fill(message.body, message); scroll(false); });
}

function figures(used, tokens, began) {
  const seconds = (performance.now() - began) / 1000;
  const speed = began && tokens > 1 && seconds > 0 ? `${(tokens / seconds).toFixed(1)} tokens/s` : "";
  const room = used ? ` · ${used} of ${context} tokens` : "";
  $("figures").textContent = speed + room;
}

async function heat(message, isLast) {
  const text = message.reasoning + message.content;
  if (!$("experts").open || !text || heatmapBusy || (!isLast && performance.now() - lastHeatmap < HEATMAP_MS)) return;
  heatmapBusy = true;
  try {
    const found = await (await ask("experts", { method: "POST", body: JSON.stringify({ text: text.slice(-20000) }) })).json();
    draw($("heatmap"), found.counts);
    $("heatmap-note").textContent = `${found.counts.length} × ${found.counts[0].length}: layers (down) by experts (across), ${found.tokens} tokens`;
  } catch (error) {
    $("heatmap-note").textContent = error.message;
  } finally {
    heatmapBusy = false;
    lastHeatmap = performance.now();
  }
}

function toggle() {
  $("send").hidden = !!running;
  $("stop").hidden = !running;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  messages.push({ role: "user", content: text });
  answer();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => { running?.abort(); messages = []; $("figures").textContent = ""; show(); });
$("experts").addEventListener("toggle", () => {
  const last = messages.findLast((m) => m.role === "assistant");
  if (last) heat(last, true);
});

ask("v1/models").then((r) => r.json()).then(({ data: [model] }) => {
  $("model").textContent = document.title = model.id;
  context = model.context_length;
}).catch((error) => { $("figures").textContent = error.message; });

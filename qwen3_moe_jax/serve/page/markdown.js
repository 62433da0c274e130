// Markdown to DOM nodes. Text of the model only ever becomes text nodes: no HTML is parsed, so none can run.

const KEYWORDS = new Set(("and as async await break case catch class const continue def del do elif else enum except export " +
  "extends false finally fn for from function global if impl import in is lambda let match mod new nil none not null or pass " +
  "pub raise return self static struct super switch this throw true try type use var void while with yield").split(" "));
const CODE = /(\/\/[^\n]*|#[^\n]*|\/\*[\s\S]*?\*\/)|("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`(?:[^`\\]|\\.)*`)|(\b\d[\w.]*\b)|([A-Za-z_]\w*)/g;

function node(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function highlighted(text) {
  const found = document.createDocumentFragment();
  let at = 0;
  for (const match of text.matchAll(CODE)) {
    const kind = match[1] ? "com" : match[2] ? "str" : match[3] ? "num" : KEYWORDS.has(match[4].toLowerCase()) ? "key" : "";
    if (!kind) continue;
    found.append(text.slice(at, match.index), node("span", kind, match[0]));
    at = match.index + match[0].length;
  }
  found.append(text.slice(at));
  return found;
}

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\n]+)\*|\[([^\]\n]{1,500})\]\(([^)\s]{1,2000})\)/;

function inline(text, into) {
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    into.append(text.slice(0, match.index));
    if (match[1] !== undefined) into.append(node("code", "", match[1]));
    else if (match[2] !== undefined) into.append(node("strong", "", match[2]));
    else if (match[3] !== undefined) into.append(node("em", "", match[3]));
    else into.append(link(match[4], match[5]));
  }
  into.append(text);
  return into;
}

function link(text, target) {
  if (!/^https?:\/\//i.test(target)) return `${text} (${target})`;
  const made = node("a", "", text);
  made.href = target;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  return made;
}

function list(lines, isNumbered) {
  const mark = isNumbered ? /^\s*\d+[.)]\s+/ : /^\s*[-*+]\s+/;
  return node(isNumbered ? "ol" : "ul", "", ...lines.map((line) => inline(line.replace(mark, ""), node("li"))));
}

function block(lines) {
  const heading = /^(#{1,6})\s+(.*)$/.exec(lines[0]);
  if (heading && lines.length === 1) return inline(heading[2], node(`h${Math.min(6, heading[1].length + 1)}`));
  if (lines.every((line) => /^\s*[-*+]\s+/.test(line))) return list(lines, false);
  if (lines.every((line) => /^\s*\d+[.)]\s+/.test(line))) return list(lines, true);
  if (lines.every((line) => line.startsWith(">"))) return inline(lines.map((l) => l.replace(/^>\s?/, "")).join("\n"), node("blockquote"));
  const paragraph = node("p");
  lines.forEach((line, i) => { if (i) paragraph.append(node("br")); inline(line, paragraph); });
  return paragraph;
}

export function rendered(text) {
  const found = document.createDocumentFragment();
  let lines = [];
  const flush = () => { if (lines.length) found.append(block(lines)); lines = []; };
  const all = text.split("\n");
  for (let i = 0; i < all.length; i++) {
    const fence = /^\s*(`{3,}|~{3,})/.exec(all[i]);
    if (fence) {
      flush();
      const code = [];
      for (i++; i < all.length && !all[i].trim().startsWith(fence[1]); i++) code.push(all[i]);
      found.append(node("pre", "", node("code", "", highlighted(code.join("\n")))));
    } else if (!all[i].trim()) flush();
    else if (/^#{1,6}\s/.test(all[i])) { flush(); found.append(block([all[i]])); }
    else lines.push(all[i]);
  }
  flush();
  return found;
}

"use strict";
// What a ledger's page reads: the arrays in it, and the sums over what is chosen of them.
// n sites in their order, K segments between K + 1 checkpoints; arrays lie row by row.

const KINDS = { int32: Int32Array, float32: Float32Array, float64: Float64Array };

const sum = (xs) => xs.reduce((total, x) => total + x, 0);

async function unpack(x) {
  if (Array.isArray(x) || x === null || typeof x !== "object") return x;
  if (typeof x.data !== "string" || !(x.kind in KINDS)) {
    const pairs = Object.entries(x).map(async ([key, value]) => [key, await unpack(value)]);
    return Object.fromEntries(await Promise.all(pairs));
  }
  const binary = atob(x.data), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = KINDS[x.kind].BYTES_PER_ELEMENT, count = planes.length / size;
  const whole = new Uint8Array(planes.length);
  for (let b = 0; b < size; b++)
    for (let i = 0; i < count; i++) whole[i * size + b] = planes[b * count + i];
  return Object.assign(new KINDS[x.kind](whole.buffer), { shape: x.shape });
}

// A ledger, and what is chosen of it: a quantity, from which checkpoint to which, and through what.
class Ledger {
  constructor(data) {
    Object.assign(this, data);
    this.segments = this.names.length - 1;
    this.size = this.pieces.length;
    this.quantities = Object.keys(this.parts);
    this.components = Object.keys(this.parts[this.quantities[0]]);
    Object.assign(this, { quantity: this.quantities[0], from: 0, to: this.segments });
    Object.assign(this, { part: "total", first: 0, last: Infinity });
    this.owner = new Int32Array(this.size);
    this.texts.forEach((text, t) => this.owner.fill(t, text.start, text.end));
  }
  string(places, i) {
    return this.strings[places[i]];
  }
  // Over the chosen segments, of an array [K, …] whose segments are `stride` apart.
  over(array, stride, offset) {
    let total = 0;
    for (let k = this.from; k < this.to; k++) total += array[k * stride + offset];
    return total;
  }
  // Of a site, at the first and at the last checkpoint that are chosen.
  ends(quantity, i) {
    return [this.from, this.to].map((k) => this.values[quantity][k * this.size + i]);
  }
  change(i) {
    const values = this.values[this.quantity];
    return values[this.to * this.size + i] - values[this.from * this.size + i];
  }
  through(component, i) {
    return this.over(this.parts[this.quantity][component], this.size, i);
  }
  residual(i) {
    return sum(this.components.map((component) => this.through(component, i))) - this.change(i);
  }
  // Places of a token's account by layer: the embedding, the layers, the final norm; 0 without it.
  get depth() {
    return this.by_token[this.quantity]?.shape[1] ?? 0;
  }
  layer(place, i) {
    return this.over(this.by_token[this.quantity], this.depth * this.size, place * this.size + i);
  }
  // What is shown of a site: its change, or what of it went through the chosen part.
  amount(i) {
    if (this.part === "total") return this.change(i);
    if (this.part !== "layers") return this.through(this.part, i);
    let total = 0;
    for (let place = this.first; place <= this.last; place++) total += this.layer(place, i);
    return total;
  }
  // [L] of a text's sum over its sites, of a kind of parameter.
  ofKind(kind, t) {
    const array = this.by_layer[this.quantity][kind], count = array.shape[2];
    const read = (l) => this.over(array, this.texts.length * count, t * count + l);
    return Array.from({ length: count }, (_, l) => read(l));
  }
  // The residual's share of the change, root mean square over the sites.
  missed() {
    const sites = Array.from({ length: this.size }, (_, i) => i);
    const square = (read) => sum(sites.map((i) => read(i) ** 2));
    return Math.sqrt(square((i) => this.residual(i)) / square((i) => this.change(i)));
  }
}
